"""Triton kernels without a device constant: backends register them under their own configurations."""
