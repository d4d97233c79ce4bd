"""Kernels for NVIDIA Hopper: Gluon in .py, CUDA C++ in .cu; `backends/cuda/<op>.py` launches them."""
