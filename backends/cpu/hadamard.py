"""hadamard on the processor."""

from functools import cache

import torch
from torch import Tensor

from dsa_hal.ops.norm import hadamard

EDGE = 128
"""Largest matrix; wider transforms are a product from the left and one from the right."""


@cache
def _matrix(dim: int) -> Tensor:
    """The orthonormal transform as a symmetric fp32 matrix [dim, dim]."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < dim:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix.mul(dim**-0.5)


def transform(wide: Tensor) -> Tensor:
    """The transform of fp32 rows [..., dim], in fp32."""
    dim = wide.shape[-1]
    if dim <= EDGE:
        return wide @ _matrix(dim)
    tiles = wide.reshape(*wide.shape[:-1], dim // EDGE, EDGE) @ _matrix(EDGE)
    return transform(tiles.mT).mT.reshape(wide.shape)


@hadamard.impl("cpu", "torch", contract=1)
def forward(x: Tensor) -> Tensor:
    return transform(x.float()).to(x.dtype)
