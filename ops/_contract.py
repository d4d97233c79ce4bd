"""Sentences that several ops' `invalid` share: the dtype or shape found, and the one expected."""

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of activations."""


def floats(**tensors: Tensor) -> str | None:
    """None if every tensor is bf16, fp16 or fp32."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            return f"{name} is {tensor.dtype}; expected bfloat16, float16 or float32"
    return None


def typed(dtype: torch.dtype, **tensors: Tensor | None) -> str | None:
    """None if every tensor that is given has `dtype`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != dtype:
            return f"{name} is {tensor.dtype}; expected {dtype}"
    return None


def shaped(name: str, tensor: Tensor, *want: int | str) -> str | None:
    """None if the shape is `want`; a word instead of a number names an axis of any size."""
    fits = tensor.dim() == len(want) and all(
        isinstance(w, str) or w == size for w, size in zip(want, tensor.shape, strict=True)
    )
    if fits:
        return None
    return f"{name} has shape {list(tensor.shape)}; expected [{', '.join(map(str, want))}]"
