"""Products with weights: FP8 with block scales, and the same for a group of experts.

Weights are [n, k] and are multiplied from the right as transposes, as in every linear layer. FP8
activations carry a scale per 1 x 128 group, FP8 weights one per 128 x 128 block: `quantize_fp8`
makes both. Source of the contracts: DeepGEMM's `fp8_gemm_nt` and `m_grouped_fp8_gemm_nt_*`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dsa_hal.case import Case, Cost, Inputs, Maker, case
from dsa_hal.check import calc_diff, each
from dsa_hal.ops._contract import FLOATS, floats, shaped, typed
from dsa_hal.ops.quant import FP8_MAX, blocks, spread
from dsa_hal.registry import op

BLOCK = 128
"""Edge of a weight's scale block, and length of an activation's scale group."""

MODEL_SHAPES = {
    "qkv_a": (2112, 7168),
    "kv_a": (576, 7168),
    "q_b": (24576, 1536),
    "kv_b": (32768, 512),
    "o": (7168, 16384),
    "gate_up": (4096, 7168),
    "down": (7168, 2048),
}
"""(n, k) of the true model's layers; `qkv_a` joins q_a and kv_a; `gate_up`, `down`: an expert's."""


def wide(values: Tensor, scale: Tensor, block_rows: int) -> Tensor:
    """FP8 values times their scales, in fp32: [..., rows, cols]."""
    rows, cols = values.shape[-2:]
    return values.float() * spread(scale, rows, cols, block_rows, BLOCK)


def make_values(make: Maker, *shape: int) -> Tensor:
    """e4m3 values that use most of the format's range."""
    return make.randn(*shape, scale=60.0).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def make_scale(make: Maker, *shape: int) -> Tensor:
    """Positive scales, none a power of two, up to two orders of magnitude apart."""
    return (make.randn(*shape).abs() + 0.05) * 0.02


def make_stack(make: Maker, groups: int, n: int, k: int) -> Tensor:
    """e4m3 weights [groups, n, k]; the groups are the same rows in another order, so that a large
    stack is made quickly and yet no two groups give the same product."""
    raw = make_values(make, n, k).view(torch.uint8)
    return torch.stack([raw.roll(17 * g, 0) for g in range(groups)]).view(torch.float8_e4m3fn)


def make_layout(make: Maker, m: int, groups: int, align: int, *, hit: int = 0) -> Tensor:
    """Group of each row [m] int32: a few groups hit, ascending, their starts multiples of `align`,
    the room between them and after them -1."""
    layout = [-1] * m
    chosen = sorted(make.pick.sample(range(groups), min(hit or max(1, groups - 1), groups)))
    at = 0
    for left, group in zip(range(len(chosen), 0, -1), chosen, strict=True):
        count = make.pick.randint(0, max(0, 2 * (m - at) // left))
        layout[at : at + count] = [group] * len(layout[at : at + count])
        at += count + -count % align
    return make.tensor(layout)


# -- fp8_gemm -----------------------------------------------------------------------------------


def _fp8_inputs(make: Maker, *, m: int, n: int, k: int, fp32: bool) -> Inputs:
    return dict(
        a=make_values(make, m, k),
        a_scale=make_scale(make, m, blocks(k, BLOCK)),
        b=make_values(make, n, k),
        b_scale=make_scale(make, blocks(n, BLOCK), blocks(k, BLOCK)),
        out_dtype=torch.float32 if fp32 else torch.bfloat16,
    )


def _fp8_cost(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Cost:  # fmt: skip
    (m, k), n = a.shape, b.shape[0]
    scales = 4 * (a_scale.numel() + b_scale.numel())
    return Cost(2.0 * m * n * k, m * k + n * k + scales + m * n * out_dtype.itemsize)


def _fp8_invalid(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> str | None:  # fmt: skip
    if wrong := shaped("a", a, "m", "k") or shaped("b", b, "n", a.shape[1]):
        return wrong
    return (
        _fp8_types(a, a_scale, b, b_scale, out_dtype)
        or shaped("a_scale", a_scale, a.shape[0], blocks(a.shape[1], BLOCK))
        or shaped("b_scale", b_scale, blocks(b.shape[0], BLOCK), blocks(b.shape[1], BLOCK))
    )


def _fp8_types(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype
) -> str | None:
    if out_dtype not in FLOATS:
        return f"out_dtype is {out_dtype}; expected bfloat16, float16 or float32"
    return typed(torch.float8_e4m3fn, a=a, b=b) or typed(
        torch.float32, a_scale=a_scale, b_scale=b_scale
    )


def _model_cases(*rows: int) -> list[Case]:
    return [
        case(f"{name}_m{m}", model=True, m=m, n=n, k=k, fp32=False)
        for name, (n, k) in MODEL_SHAPES.items()
        for m in rows
    ]


@op(
    version=1,
    constant=("n", "k", "fp32"),
    variable={"m": "a[0]"},
    inputs=_fp8_inputs,
    cases=(
        case("empty", m=0, n=256, k=256, fp32=False),
        case("one", m=1, n=128, k=128, fp32=True),
        case("odd", m=63, n=384, k=256, fp32=True),
        case("more", m=65, n=128, k=512, fp32=False),
        case("half_block", m=5, n=576, k=512, fp32=True, traps=(7, 24)),
        case("ragged", m=3, n=200, k=200, fp32=True, traps=(24,)),
        *_model_cases(1, 64, 128, 4096),
    ),
    check=each(out=calc_diff(1e-6)),
    cost=_fp8_cost,
    invalid=_fp8_invalid,
)
def fp8_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """a @ b.T of FP8 operands, accumulated in fp32 with every block's scales applied.

    a         [m, k] float8_e4m3fn
    a_scale   [m, ceil(k / 128)] fp32, multiplies
    b         [n, k] float8_e4m3fn
    b_scale   [ceil(n / 128), ceil(k / 128)] fp32, multiplies; edge blocks may be partial
    -> out    [m, n] out_dtype, rounded once

    Source: `fp8_gemm` of the model's demo code; DeepGEMM's `fp8_gemm_nt`.
    """
    return (wide(a, a_scale, 1) @ wide(b, b_scale, BLOCK).T).to(out_dtype)


# -- grouped_gemm -------------------------------------------------------------------------------


def _grouped_inputs(
    make: Maker, *, m: int, groups: int, n: int, k: int, align: int, dtype: torch.dtype
) -> Inputs:
    return dict(
        a=make.randn(m, k, dtype=dtype),
        b=make.randn(groups, n, k, dtype=dtype, scale=k**-0.5),
        grouped_layout=make_layout(make, m, groups, align),
    )


def _grouped_cost(a: Tensor, b: Tensor, grouped_layout: Tensor) -> Cost:
    (m, k), (groups, n, _) = a.shape, b.shape
    return Cost(2.0 * m * n * k, (m * k + m * n + min(m, groups) * n * k) * a.element_size())


def _layout_invalid(grouped_layout: Tensor, rows: int) -> str | None:
    return typed(torch.int32, grouped_layout=grouped_layout) or shaped(
        "grouped_layout", grouped_layout, rows
    )


def _grouped_invalid(a: Tensor, b: Tensor, grouped_layout: Tensor) -> str | None:
    if wrong := shaped("a", a, "m", "k") or shaped("b", b, "groups", "n", a.shape[1]):
        return wrong
    return floats(a=a) or typed(a.dtype, b=b) or _layout_invalid(grouped_layout, a.shape[0])


def _padding_rows(tensor: Tensor, grouped_layout: Tensor) -> Tensor:
    return (grouped_layout < 0)[:, None].expand(tensor.shape)


def _grouped_unread(a: Tensor, b: Tensor, grouped_layout: Tensor) -> Mapping[str, Tensor]:
    return {"a": _padding_rows(a, grouped_layout)}


@op(
    version=1,
    constant=("groups", "n", "k", "align", "dtype"),
    variable={"m": "a[0]"},
    inputs=_grouped_inputs,
    cases=(
        case("empty", m=0, groups=4, n=64, k=64, align=1, dtype=torch.bfloat16),
        case("one", m=1, groups=4, n=64, k=96, align=1, dtype=torch.bfloat16),
        case("odd", m=63, groups=8, n=65, k=72, align=1, dtype=torch.float32),
        case("aligned", m=97, groups=8, n=128, k=64, align=16, dtype=torch.float16, seed=1),
        case("experts", m=80, groups=64, n=128, k=128, align=1, dtype=torch.bfloat16),
        case(
            "gate_up_m1024", model=True, m=1024, groups=32, n=4096, k=7168, align=1,
            dtype=torch.bfloat16,
        ),
    ),
    check=each(out=calc_diff(3e-6)),
    cost=_grouped_cost,
    invalid=_grouped_invalid,
    unread=_grouped_unread,
)  # fmt: skip
def grouped_gemm(a: Tensor, b: Tensor, grouped_layout: Tensor) -> Tensor:
    """Row i of `a` times the transpose of its own group's weight: a[i] @ b[grouped_layout[i]].T.

    a               [m, k] bf16, fp16 or fp32
    b               [groups, n, k] a's dtype
    grouped_layout  [m] int32: the row's group, or -1 for a padding row, whose `a` is not read; any
                    other value outside [0, groups) is an error. Rows of one group stand together in
                    what `permute` makes; other orders are correct, but slow.
    -> out          [m, n] a's dtype, accumulated in fp32; padding rows zero

    Source: DeepGEMM's `m_grouped_bf16_gemm_nt_contiguous`, which leaves padding rows undefined.
    """
    out = a.new_zeros((a.shape[0], b.shape[1]), dtype=torch.float32)
    for group, weight in enumerate(b):
        mine = (grouped_layout == group)[:, None]
        out = torch.where(mine, a.float() @ weight.float().T, out)
    return out.to(a.dtype)


# -- grouped_fp8_gemm ---------------------------------------------------------------------------


def _contiguous_inputs(
    make: Maker, *, m: int, groups: int, n: int, k: int, align: int, fp32: bool
) -> Inputs:
    return dict(
        a=make_values(make, m, k),
        a_scale=make_scale(make, m, blocks(k, BLOCK)),
        b=make_stack(make, groups, n, k),
        b_scale=make_scale(make, groups, blocks(n, BLOCK), blocks(k, BLOCK)),
        grouped_layout=make_layout(make, m, groups, align),
        out_dtype=torch.float32 if fp32 else torch.bfloat16,
    )


def _contiguous_cost(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, grouped_layout: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Cost:  # fmt: skip
    (m, k), (groups, n, _) = a.shape, b.shape
    read = m * k + min(m, groups) * n * k + 4 * a_scale.numel()
    return Cost(2.0 * m * n * k, read + m * n * out_dtype.itemsize)


def _contiguous_invalid(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, grouped_layout: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> str | None:  # fmt: skip
    if wrong := shaped("a", a, "m", "k") or shaped("b", b, "groups", "n", a.shape[1]):
        return wrong
    (m, k), (groups, n, _) = a.shape, b.shape
    return (
        _fp8_types(a, a_scale, b, b_scale, out_dtype)
        or shaped("a_scale", a_scale, m, blocks(k, BLOCK))
        or shaped("b_scale", b_scale, groups, blocks(n, BLOCK), blocks(k, BLOCK))
        or _layout_invalid(grouped_layout, m)
    )


def _contiguous_unread(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, grouped_layout: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Mapping[str, Tensor]:  # fmt: skip
    return {
        "a": _padding_rows(a, grouped_layout),
        "a_scale": _padding_rows(a_scale, grouped_layout),
    }


@op(
    version=1,
    constant=("groups", "n", "k", "align", "fp32"),
    variable={"m": "a[0]"},
    inputs=_contiguous_inputs,
    cases=(
        case("empty", m=0, groups=2, n=128, k=128, align=1, fp32=False),
        case("one", m=1, groups=4, n=128, k=128, align=1, fp32=True),
        case("odd", m=63, groups=8, n=192, k=256, align=1, fp32=True),
        case("padded", m=300, groups=3, n=128, k=384, align=128, fp32=False, seed=3),
        case("ragged", m=65, groups=4, n=200, k=200, align=16, fp32=True, traps=(24,)),
        case("experts", m=64, groups=64, n=128, k=256, align=1, fp32=False),
        *(
            case(f"{name}_m{m}", model=True, m=m, groups=groups, n=n, k=k, align=128, fp32=False)
            for name, (n, k) in MODEL_SHAPES.items()
            if name in ("gate_up", "down")
            for m, groups in ((128, 4), (4096, 32))
        ),
    ),
    check=each(out=calc_diff(1e-6)),
    cost=_contiguous_cost,
    invalid=_contiguous_invalid,
    unread=_contiguous_unread,
)
def grouped_fp8_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, grouped_layout: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """`fp8_gemm` of each row of `a` with its own group's weight.

    a               [m, k] float8_e4m3fn
    a_scale         [m, ceil(k / 128)] fp32
    b               [groups, n, k] float8_e4m3fn
    b_scale         [groups, ceil(n / 128), ceil(k / 128)] fp32
    grouped_layout  [m] int32: the row's group, or -1 for a padding row, as in `grouped_gemm`
    -> out          [m, n] out_dtype; padding rows zero

    Source: DeepGEMM's `m_grouped_fp8_gemm_nt_contiguous`, which asks for groups that start at
    multiples of 128 and leaves padding rows undefined; neither is so here.
    """
    out = a.new_zeros((a.shape[0], b.shape[1]), dtype=torch.float32)
    rows = wide(a, a_scale, 1)
    for group in range(b.shape[0]):
        mine = (grouped_layout == group)[:, None]
        out = torch.where(mine, rows @ wide(b[group], b_scale[group], BLOCK).T, out)
    return out.to(out_dtype)


# -- grouped_fp8_gemm_masked --------------------------------------------------------------------


def _masked_inputs(make: Maker, *, max_m: int, groups: int, n: int, k: int, fp32: bool) -> Inputs:
    rows = [make.pick.randint(0, max_m) for _ in range(groups)]
    rows[0], rows[-1] = 0, max_m  # a group that nothing was sent to, and a full one
    return dict(
        a=make_values(make, groups, max_m, k),
        a_scale=make_scale(make, groups, max_m, blocks(k, BLOCK)),
        b=make_stack(make, groups, n, k),
        b_scale=make_scale(make, groups, blocks(n, BLOCK), blocks(k, BLOCK)),
        masked_m=make.tensor(rows),
        out_dtype=torch.float32 if fp32 else torch.bfloat16,
    )


def _masked_cost(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, masked_m: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Cost:  # fmt: skip
    (groups, max_m, k), n = a.shape, b.shape[1]
    moved = a.numel() + b.numel() + 4 * a_scale.numel() + groups * max_m * n * out_dtype.itemsize
    return Cost(2.0 * groups * max_m * n * k, moved)


def _masked_invalid(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, masked_m: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> str | None:  # fmt: skip
    if wrong := shaped("a", a, "groups", "max_m", "k"):
        return wrong
    groups, max_m, k = a.shape
    if wrong := shaped("b", b, groups, "n", k):
        return wrong
    return (
        _fp8_types(a, a_scale, b, b_scale, out_dtype)
        or shaped("a_scale", a_scale, groups, max_m, blocks(k, BLOCK))
        or shaped("b_scale", b_scale, groups, blocks(b.shape[1], BLOCK), blocks(k, BLOCK))
        or typed(torch.int32, masked_m=masked_m)
        or shaped("masked_m", masked_m, groups)
    )


def _masked_unread(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, masked_m: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Mapping[str, Tensor]:  # fmt: skip
    beyond = (torch.arange(a.shape[1], device=a.device) >= masked_m[:, None])[..., None]
    return {"a": beyond.expand(a.shape), "a_scale": beyond.expand(a_scale.shape)}


@op(
    version=1,
    constant=("max_m", "groups", "n", "k", "fp32"),
    variable={},
    inputs=_masked_inputs,
    cases=(
        case("one_row", max_m=1, groups=3, n=128, k=128, fp32=True),
        case("odd", max_m=13, groups=6, n=192, k=256, fp32=True),
        case("ragged", max_m=65, groups=4, n=200, k=200, fp32=False, traps=(24,)),
        *(
            case(f"{name}_{groups}x{rows}", model=True, max_m=rows, groups=groups, n=n, k=k,
                 fp32=False)
            for name, (n, k) in MODEL_SHAPES.items()
            if name in ("gate_up", "down")
            for groups, rows in ((32, 20), (32, 192))
        ),
    ),
    check=each(out=calc_diff(1e-6)),
    cost=_masked_cost,
    invalid=_masked_invalid,
    unread=_masked_unread,
)  # fmt: skip
def grouped_fp8_gemm_masked(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, masked_m: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """`fp8_gemm` group by group, each with as many rows as a count on the device says: shapes stay
    fixed, as graph capture needs.

    a         [groups, max_m, k] float8_e4m3fn
    a_scale   [groups, max_m, ceil(k / 128)] fp32
    b         [groups, n, k] float8_e4m3fn
    b_scale   [groups, ceil(n / 128), ceil(k / 128)] fp32
    masked_m  [groups] int32 in [0, max_m]: rows in use; `a` is not read beyond them
    -> out    [groups, max_m, n] out_dtype; rows from masked_m on are zero

    Source: DeepGEMM's `m_grouped_fp8_gemm_nt_masked`, which leaves those rows undefined.
    """
    inside = (torch.arange(a.shape[1], device=a.device) < masked_m[:, None])[..., None]
    product = wide(a, a_scale, 1) @ wide(b, b_scale, BLOCK).mT
    return torch.where(inside, product, 0.0).to(out_dtype)
