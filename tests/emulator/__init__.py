"""Runs the PTX that Triton compiles, on CPU tensors, and notices what is wrong with it: see README.md."""
