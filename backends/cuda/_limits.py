"""What NVIDIA GPUs are good at in plain torch."""

from dsa_hal.backends.portable.chunks import Limits

LIMITS = Limits(workspace=512 << 20, launch=64 << 20, gather=128, half=True)
