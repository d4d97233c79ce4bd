"""Kernels of one stream that overlap: on NVIDIA's GPUs from Hopper on, a kernel may let the next
one begin before it ends, if that was launched to wait by itself (`_nvrtc.Module.launch`)."""

from dsa_hal.selection import selection


def overlaps() -> bool:
    """Whether a kernel of the target in force can let the next one begin early."""
    return selection().target.arch == "sm90"
