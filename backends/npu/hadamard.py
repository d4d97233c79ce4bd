"""hadamard on Ascend, as products with the matrix."""

from functools import cache

import torch
from torch import Tensor

from dsa_hal.ops.norm import hadamard

EDGE = 128
"""Largest matrix; wider transforms are a product from the left and one from the right."""


@cache
def _matrix(dim: int, device: torch.device) -> Tensor:
    """The transform as a symmetric fp32 matrix of ones and minus ones [dim, dim]."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.to(device)


def _product(wide: Tensor) -> Tensor:
    """fp32 rows [..., dim] times the matrix of their width."""
    dim = wide.shape[-1]
    if dim <= EDGE:
        return wide @ _matrix(dim, wide.device)
    tiles = wide.unflatten(-1, (dim // EDGE, EDGE)) @ _matrix(EDGE, wide.device)
    return _product(tiles.mT).mT.reshape(wide.shape)


@hadamard.impl("npu", "matmul", contract=1)
def transform(x: Tensor) -> Tensor:
    """In fp32, rounded once."""
    return _product(x.float()).mul(x.shape[-1] ** -0.5).to(x.dtype)
