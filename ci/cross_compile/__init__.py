"""Every registered Triton and Gluon kernel, compiled for gfx950, gfx942 and sm90 without a device,
held against rules and a committed table.

    python -m ci.cross_compile            compile, judge, show how the table of this Triton changed
    python -m ci.cross_compile --check    the same; a change is an error
    python -m ci.cross_compile --write    the same; the table is written

Which kernels there are is not listed anywhere: `collect` calls the implementations on meta tensors.
"""
