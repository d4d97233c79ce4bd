"""Triton kernels without a device constant; backends register them, with configurations of their own."""
