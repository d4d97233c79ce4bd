"""Triton kernels without a device constant; backends register them, each with its own tiles."""
