"""Kernels compiled for GPUs that are not there: their machine code is read, and their times are predicted."""
