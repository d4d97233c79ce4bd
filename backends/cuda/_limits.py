"""What NVIDIA GPUs are good at in plain torch."""

from dataclasses import replace

from dsa_hal.backends.portable.chunks import Limits

LIMITS = Limits(workspace=512 << 20, launch=64 << 20, gather=128, half=True)
REPEATING = replace(LIMITS, repeats=True)
"""The same where two calls must agree to the bit: atomic additions do not."""
