"""Kernels compiled for GPUs that this machine lacks: their machine code is read, and their times are predicted."""
