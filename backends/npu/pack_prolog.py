"""pack_prolog on Ascend."""

import torch
from torch import Tensor

from dsa_hal.backends.npu._library import call, refusal
from dsa_hal.ops.prolog import pack_prolog

FRACTAL_NZ = 29
"""CANN's number of the format in which its matrix units read a weight: tiles behind the shape."""


def _why_not(weights: list[Tensor]) -> str | None:
    for weight in (weights[0], weights[1], weights[3]):
        shape = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        if (reason := refusal("npu_format_cast", input=shape, acl_format=FRACTAL_NZ)) is not None:
            return reason
    return None


@pack_prolog.impl("npu", "format_cast", contract=1, why_not=_why_not)
def cast(weights: list[Tensor]) -> list[Tensor]:
    """The three matrices in the order of the matrix units; the heads' own stay as they are. The
    format of a tensor cannot be asked of one without data, so an empty fifth says that it is so."""
    q_a, q_b, kv_a = (
        call("npu_format_cast", input=weight.contiguous(), acl_format=FRACTAL_NZ)
        for weight in (weights[0], weights[1], weights[3])
    )
    return [q_a, q_b, weights[2].contiguous(), kv_a, weights[0].new_empty(0)]
