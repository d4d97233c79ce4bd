"""CUDA C++ kernels for NVIDIA Hopper; `backends/cuda/<op>.py` launches them."""
