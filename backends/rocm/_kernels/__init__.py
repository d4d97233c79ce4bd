"""Gluon kernels for gfx950: Triton's language with layouts, shared memory and matrix instructions
stated instead of chosen."""
