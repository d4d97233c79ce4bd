"""Which caches the kernels of this package know. Their launches take addresses and strides, and
would read any other order as one of these."""

import torch
from torch import Tensor

from dsa_hal.ops.layout import KVLayout

ORDERS = ("token", "page")
"""Orders of records that the kernels read and write."""


def unknown(layout: str) -> str | None:
    """Why pages in `layout` are not served, or None."""
    form = KVLayout.parse(layout)
    if form.order in ORDERS and form.codes != "int8":
        return None
    return f"the cache is {layout}; it takes FP8 and floats in {' or '.join(ORDERS)} order"


def coded(q: Tensor) -> str | None:
    """Why scores of queries of this type are not served, or None."""
    if q.dtype != torch.int8:
        return None
    return "q is torch.int8; it takes float8_e4m3fn and floating-point types"
