"""What the processor is good at in training."""

from dsa_hal.backends.portable.chunks import Limits

LIMITS = Limits(workspace=8 << 20, launch=1 << 10, gather=16)
