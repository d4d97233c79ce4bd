"""What training in plain torch may take of an NPU's memory."""

from dsa_hal.backends.portable.chunks import Limits

LIMITS = Limits(workspace=256 << 20, launch=1 << 24, gather=16)
"""`launch` and `gather` are guesses: nothing was measured on a device."""
