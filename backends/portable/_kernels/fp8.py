"""FP8's dialects inside Triton programs."""

import triton
import triton.language as tl


@triton.jit
def spoken(codes, FNUZ: tl.constexpr):
    """e4m3fn codes as they are, or, with FNUZ, as the codes of e4m3fnuz that mean half of each:
    see `dsa_hal.backends.portable.dialect`. Other dtypes as they are."""
    if FNUZ and codes.dtype == tl.float8e4nv:
        bits = codes.to(tl.uint8, bitcast=True)
        size = bits & 0x7F
        bits = tl.where(size == 0x7F, 0x80, tl.where(size == 0, 0, bits)).to(tl.uint8)
        return bits.to(tl.float8e4b8, bitcast=True)
    else:
        return codes


@triton.jit
def understood(product, codes, FNUZ: tl.constexpr):
    """A product of two operands that were `spoken`, in their own measure; `codes` is one of them
    as it was."""
    if FNUZ and codes.dtype == tl.float8e4nv:
        return product * 4.0
    else:
        return product
