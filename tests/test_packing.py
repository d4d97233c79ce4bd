"""`pack_weight` and the products that take its answer, on the target in force, against references
on what the checkpoint holds; and the processor's own rounding of activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsa_hal.backends.cpu._product import rounded
from dsa_hal.case import Case
from dsa_hal.errors import BadInput
from dsa_hal.matrix import cost_of
from dsa_hal.ops.gemm import grouped_gemm
from dsa_hal.ops.moe import moe_experts, permute, unpermute
from dsa_hal.ops.norm import rope
from dsa_hal.ops.packed import grouped_linear, linear, pack_weight
from dsa_hal.ops.quant import dequantize_fp8, quantize_fp8
from dsa_hal.registry import Op
from dsa_hal.selection import selection

PACKED = {"linear": ("weight",), "grouped_linear": ("weight",), "moe_experts": ("w13", "w2")}
"""Ops that take packed weights, and under which names."""


def rows() -> list[Any]:
    ops: tuple[Op[..., Any], ...] = (linear, grouped_linear, moe_experts)
    return [
        pytest.param(op, case, id=f"{op.name}-{case.name}")
        for op in ops
        for case in op.cases
        if cost_of(op, case).bytes < 2e6
    ]


@pytest.mark.parametrize(("op", "case"), rows())
def test_packed_means_what_the_checkpoint_says(op: Op[..., Any], case: Case) -> None:
    inputs = case.make(op.inputs, selection().target.device)
    want = op.reference(**inputs)
    packed = {name: pack_weight(*inputs[name]) for name in PACKED[op.name]}
    report = op.check((op(**{**inputs, **packed}),), (want,), inputs)
    assert report.ok, str(report)


def test_an_unquantised_weight_is_not_copied() -> None:
    weight = torch.randn(8, 16, dtype=torch.bfloat16)
    assert any(part.data_ptr() == weight.data_ptr() for part in pack_weight(weight))


@pytest.mark.parametrize("pow2", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 1e3])
def test_rounding_without_fp8_is_that_of_fp8(pow2: bool, dtype: torch.dtype, scale: float) -> None:
    """Values over the whole range of the format, its subnormals and ties between neighbours too."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(65, 300, generator=generator) * scale
    x *= torch.exp2(torch.randint(-14, 1, x.shape, generator=generator))
    x[0] = 0
    x[1, :128] = 448.0
    x[1, 1:128] = torch.arange(127) * 2.0**-10  # halves of subnormal steps
    x[2, :128] = torch.arange(128) * 0.5  # up to 64: ties above 16
    x[2, 0] = 448.0
    x = x.to(dtype)
    values, scales = quantize_fp8(x, pow2=pow2)
    want = dequantize_fp8(values, scales, out_dtype=torch.float32)
    got = rounded(x, "fp8_pow2" if pow2 else "fp8")
    assert torch.equal(got, want)


def test_wrong_indices_are_named() -> None:
    x, ids = torch.randn(3, 8), torch.tensor([[0, 1], [2, 5], [-1, 0]], dtype=torch.int32)
    stack, weights = torch.randn(4, 8, 8), torch.ones(3, 2)
    with pytest.raises(BadInput, match=r"ids\[1, 1\] is 5; expected -1 or 0 to 3"):
        permute(x, ids, experts=4)
    with pytest.raises(BadInput, match=r"is 5; expected -1 or 0 to 3"):
        moe_experts(x, ids, weights, [torch.randn(4, 8, 8)], [torch.randn(4, 8, 4)])
    with pytest.raises(BadInput, match=r"position\[1, 1\] is 5"):
        unpermute(torch.randn(4, 8), ids, weights)
    with pytest.raises(BadInput, match=r"grouped_layout\[2\] is -2"):
        grouped_gemm(x, stack, torch.tensor([0, 1, -2], dtype=torch.int32))
    table = torch.randn(4, 8)
    for position in (4, -1):
        with pytest.raises(BadInput, match=rf"positions\[1\] is {position}"):
            rope(x, torch.tensor([0, position, 1]), table, interleaved=True)
