"""Linear layers over packed weights: what a checkpoint's weight becomes is the backend's choice.

A packed weight is a list of tensors that `pack_weight` of a backend made and that `linear`,
`grouped_linear` and `moe_experts` of the same backend take. The canonical form, which every backend
also takes, is what the checkpoint holds: [weight], or [weight e4m3, scale fp32].
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dsa_hal.case import Cost, Inputs, Maker, case
from dsa_hal.check import Check, Finding, Report, bitwise, calc_diff, each
from dsa_hal.errors import DsaHalError
from dsa_hal.ops._contract import floats, shaped, typed
from dsa_hal.ops.gemm import (
    BLOCK,
    MODEL_SHAPES,
    fp8_gemm,
    grouped_fp8_gemm,
    grouped_gemm,
    make_layout,
    make_scale,
    make_stack,
    make_values,
)  # fmt: skip
from dsa_hal.ops.quant import blocks, dequantize_fp8, quantize_fp8
from dsa_hal.registry import composite
from dsa_hal.selection import use

ACTS = ("none", "fp8", "fp8_pow2")
"""How activations are rounded before a product: not at all, or to FP8 in groups of 128 with plain
or power-of-two scales (the checkpoint's dynamic activation scheme)."""

ACT_BOUND = 1e-3
"""calc_diff of an activation's FP8 rounding; implementations may round less than they are asked."""

PACKED_BOUNDS = {torch.bfloat16: 3e-6, torch.float16: 3e-6, torch.int8: 5e-4}
"""calc_diff of a product with a weight packed in a narrower format than the checkpoint's meaning:
half the energy that its rounding adds. bf16 and fp16 need 1.5e-6. int8 with a scale per output, and
per row of x, needs 3e-6 times the square of how far a row's largest element exceeds its mean
square's root, which is 4 to 8. Other formats are held to fp32's order of sums."""


def by_act(exact: float, *, roundings: int = 1) -> Check:
    """The check of ops with one output; `exact` bounds calc_diff where no rounding is asked for.
    Where it is, each of so many roundings may be left out."""
    loose, plain = each(out=calc_diff(ACT_BOUND * roundings)), each(out=calc_diff(exact))

    def check(got: Sequence[Tensor], want: Sequence[Tensor], inputs: Inputs) -> Report:
        return (plain if inputs["act"] == "none" else loose)(got, want, inputs)

    return check


def act_wrong(act: str) -> str | None:
    """Why `act` is no known rounding; for the `invalid` of ops."""
    return None if act in ACTS else f"act is {act!r}; expected one of {', '.join(ACTS)}"


def packed_wrong(weight: list[Tensor], axes: int, name: str = "weight") -> str | None:
    """Why a list is no canonical packed weight of so many axes. Lists of another form belong to a
    backend, which judges them itself."""
    if not weight:
        return f"{name} is an empty list; expected what pack_weight returned"
    values, *rest = weight
    if len(rest) != 1 or values.dtype != torch.float8_e4m3fn:
        return None
    if values.dim() != axes:
        return f"{name}[0] has shape {list(values.shape)}; expected {axes} axes"
    *stack, n, k = values.shape
    return typed(torch.float32, **{f"{name}[1]": rest[0]}) or shaped(
        f"{name}[1]", rest[0], *stack, blocks(n, BLOCK), blocks(k, BLOCK)
    )


def numbers(weight: list[Tensor]) -> int:
    """Bytes of a packed weight."""
    return sum(part.numel() * part.element_size() for part in weight)


def rounded(x: Tensor, act: str) -> Tensor:
    """x as the FP8 product would see it, in x's dtype."""
    if act == "none":
        return x
    values, scale = quantize_fp8(x, pow2=act == "fp8_pow2")
    return dequantize_fp8(values, scale, out_dtype=x.dtype)


def make_packed(make: Maker, kind: str, *shape: int) -> list[Tensor]:
    """A canonical weight [n, k] or [experts, n, k]: kind "fp8", or a float dtype's name."""
    if kind == "fp8":
        *stack, n, k = shape
        scale = make_scale(make, *stack, blocks(n, BLOCK), blocks(k, BLOCK))
        values = make_stack(make, stack[0], n, k) if stack else make_values(make, n, k)
        return [values, scale * k**-0.5]
    return [make.randn(*shape, dtype=getattr(torch, kind), scale=shape[-1] ** -0.5)]


# -- pack_weight --------------------------------------------------------------------------------


def _pack_inputs(make: Maker, *, shape: tuple[int, ...], kind: str) -> Inputs:
    weight, *scale = make_packed(make, kind, *shape)
    return dict(weight=weight, scale=scale[0] if scale else None)


def _pack_cost(weight: Tensor, scale: Tensor | None = None) -> Cost:
    read = numbers([weight] if scale is None else [weight, scale])
    return Cost(0.0 if scale is None else weight.numel(), 2 * read)


def _pack_invalid(weight: Tensor, scale: Tensor | None = None) -> str | None:
    if weight.dim() not in (2, 3):
        return f"weight has shape {list(weight.shape)}; expected [n, k] or [experts, n, k]"
    if scale is None:
        return floats(weight=weight)
    return typed(torch.float8_e4m3fn, weight=weight) or packed_wrong([weight, scale], weight.dim())


def _pack_check(got: Sequence[Tensor], want: Sequence[Tensor], inputs: Inputs) -> Report:
    """An answer of the canonical shapes is the canonical form, bit by bit. Any other is a backend's
    own, which means what the same backend's product makes of it, as exactly as its format can."""
    if [g.shape for g in got] == [w.shape for w in want]:
        return each(**{f"part{i}": bitwise for i in range(len(want))})(got, want, inputs)
    if not got:
        return Report((Finding("out", "tensors", "0", str(len(want)), False),))
    generator = torch.Generator().manual_seed(0)
    *stack, _, k = want[0].shape
    x = torch.randn(2 * (stack or [2])[0], k, generator=generator).to(want[0].device)
    layout = (torch.arange(x.shape[0], device=x.device) // 2).int()

    def product(weight: Sequence[Tensor]) -> Tensor:
        return grouped_linear(x, [*weight], layout) if stack else linear(x, [*weight])

    with use(backend="reference"):
        expected = product(want)
    try:
        answer = product(got)
    except DsaHalError as refusal:
        return Report((Finding("out", "refused by its own product:", str(refusal), "", False),))
    bound = PACKED_BOUNDS.get(got[0].dtype, 1e-6)
    return each(product=calc_diff(bound))([answer], [expected], inputs)


@composite(
    uses=(),
    version=1,
    constant=("shape", "kind"),
    variable={},
    inputs=_pack_inputs,
    cases=(
        case("bf16", shape=(5, 24), kind="bfloat16"),
        case("fp32", shape=(65, 130), kind="float32"),
        case("fp8", shape=(256, 384), kind="fp8", traps=(7,)),
        case("half_block", shape=(576, 256), kind="fp8", traps=(24,)),
        case("experts_bf16", shape=(3, 40, 72), kind="bfloat16"),
        case("experts_fp8", shape=(4, 192, 320), kind="fp8", traps=(24,)),
        case("kv_a", model=True, shape=MODEL_SHAPES["kv_a"], kind="fp8"),
    ),
    check=_pack_check,
    cost=_pack_cost,
    invalid=_pack_invalid,
)
def pack_weight(weight: Tensor, scale: Tensor | None = None) -> list[Tensor]:
    """A checkpoint's weight in the form that this backend's products take; done once, at load.

    weight  [n, k] or [experts, n, k]; bf16, fp16 or fp32 without a scale, else float8_e4m3fn
    scale   [(experts,) ceil(n / 128), ceil(k / 128)] fp32, multiplies (`weight_scale_inv`)
    -> out  here the canonical form, [weight] or [weight, scale], and no copy. A backend may return
            another list (fewer or more tensors, another dtype, another order in memory); for those
            the shape function of `torch.ops.dsa_hal.pack_weight` does not hold.

    Source: the checkpoint's names and blocks, `weight_dequant` of the model's demo code.
    """
    return [weight] if scale is None else [weight, scale]


# -- linear -------------------------------------------------------------------------------------


def _linear_inputs(
    make: Maker, *, tokens: int, n: int, k: int, kind: str, act: str, dtype: torch.dtype
) -> Inputs:
    x = make.randn(tokens, k, dtype=dtype)
    x[:, ::61] *= 20  # outlying channels, as activations have
    return dict(x=x, weight=make_packed(make, kind, n, k), act=act)


def _linear_cost(x: Tensor, weight: list[Tensor], *, act: str = "none") -> Cost:
    n = weight[0].shape[0]
    moved = (x.numel() + x.shape[0] * n) * x.element_size() + numbers(weight)
    return Cost(2.0 * x.numel() * n, moved)


def _linear_invalid(x: Tensor, weight: list[Tensor], *, act: str = "none") -> str | None:
    if wrong := act_wrong(act) or packed_wrong(weight, 2) or floats(x=x):
        return wrong
    if weight[0].dtype == torch.float8_e4m3fn or len(weight) == 1:
        return shaped("x", x, "tokens", weight[0].shape[-1])
    return shaped("x", x, "tokens", "k")


@composite(
    uses=(quantize_fp8, dequantize_fp8, fp8_gemm),
    version=1,
    constant=("n", "k", "kind", "act", "dtype"),
    variable={"tokens": "x[0]"},
    inputs=_linear_inputs,
    cases=(
        *(
            case(name, tokens=tokens, n=n, k=k, kind=kind, act=act, dtype=dtype)
            for name, tokens, n, k, kind, act, dtype in (
                ("empty", 0, 64, 128, "bfloat16", "none", torch.bfloat16),
                ("one", 1, 65, 96, "bfloat16", "none", torch.bfloat16),
                ("odd", 63, 40, 200, "bfloat16", "none", torch.bfloat16),
                ("more", 65, 128, 72, "float32", "none", torch.float32),
                ("half", 5, 64, 64, "float16", "none", torch.float16),
                ("fp8", 9, 256, 256, "fp8", "fp8", torch.bfloat16),
                ("fp8_empty", 0, 128, 128, "fp8", "fp8_pow2", torch.bfloat16),
                ("fp8_fp32", 65, 192, 384, "fp8", "fp8_pow2", torch.float32),
                ("fp8_weight", 7, 130, 200, "fp8", "none", torch.bfloat16),
                ("round_only", 3, 128, 256, "bfloat16", "fp8_pow2", torch.bfloat16),
            )
        ),
        case("gate", tokens=64, n=256, k=7168, kind="bfloat16", act="none", dtype=torch.float32,
             model=True, traps=(19,)),
        case("weights_proj", tokens=1, n=64, k=7168, kind="float32", act="none",
             dtype=torch.bfloat16, model=True, traps=(19,)),
        case("half_block", tokens=4, n=576, k=7168, kind="fp8", act="fp8_pow2",
             dtype=torch.bfloat16, model=True, traps=(7, 24)),
        *(
            case(f"{name}_m{tokens}", model=True, tokens=tokens, n=n, k=k, kind="fp8",
                 act="fp8_pow2", dtype=torch.bfloat16)
            for name, (n, k) in MODEL_SHAPES.items()
            for tokens in ((1, 4096) if n * k < 2e7 else (512, 4096))
        ),
    ),
    check=by_act(5e-6),
    cost=_linear_cost,
    invalid=_linear_invalid,
)  # fmt: skip
def linear(x: Tensor, weight: list[Tensor], *, act: str = "none") -> Tensor:
    """x @ weight.T of a packed weight [n, k].

    x       [tokens, k] bf16, fp16 or fp32
    weight  what `pack_weight` of this backend returned, or the canonical form
    act     "none" | "fp8" | "fp8_pow2": how x is rounded before the product. With "none", an FP8
            weight is multiplied out first and the product is a float one
    -> out  [tokens, n] x's dtype. Accumulated in fp32; operands of unlike dtypes meet in the wider
            (bf16 x and an fp32 weight are multiplied in fp32)

    Source: `linear` of the model's demo code.
    """
    if len(weight) == 2 and act != "none":
        values, scale = quantize_fp8(x, pow2=act == "fp8_pow2")
        return fp8_gemm(values, scale, weight[0], weight[1], out_dtype=x.dtype)
    matrix = weight[0]
    if len(weight) == 2:
        matrix = dequantize_fp8(weight[0], weight[1], block_rows=BLOCK, out_dtype=x.dtype)
    both = torch.promote_types(x.dtype, matrix.dtype)
    return functional.linear(rounded(x, act).to(both), matrix.to(both)).to(x.dtype)


# -- grouped_linear -----------------------------------------------------------------------------


def _grouped_inputs(
    make: Maker, *, rows: int, experts: int, n: int, k: int, kind: str, act: str,
    dtype: torch.dtype, align: int = 1,
) -> Inputs:  # fmt: skip
    return dict(
        x=make.randn(rows, k, dtype=dtype),
        weight=make_packed(make, kind, experts, n, k),
        grouped_layout=make_layout(make, rows, experts, align),
        act=act,
    )


def _grouped_cost(
    x: Tensor, weight: list[Tensor], grouped_layout: Tensor, *, act: str = "none"
) -> Cost:
    experts, n = weight[0].shape[:2]
    read = numbers(weight) * min(x.shape[0], experts) / experts
    moved = (x.numel() + x.shape[0] * n) * x.element_size()
    return Cost(2.0 * x.numel() * n, moved + read)


def _grouped_invalid(
    x: Tensor, weight: list[Tensor], grouped_layout: Tensor, *, act: str = "none"
) -> str | None:
    if wrong := act_wrong(act) or packed_wrong(weight, 3) or floats(x=x):
        return wrong
    if wrong := shaped("x", x, "rows", weight[0].shape[-1] if len(weight) == 1 else "k"):
        return wrong
    return typed(torch.int32, grouped_layout=grouped_layout) or shaped(
        "grouped_layout", grouped_layout, x.shape[0]
    )


def _grouped_unread(
    x: Tensor, weight: list[Tensor], grouped_layout: Tensor, *, act: str = "none"
) -> dict[str, Tensor]:
    return {"x": (grouped_layout < 0)[:, None].expand(x.shape)}


@composite(
    uses=(quantize_fp8, dequantize_fp8, grouped_gemm, grouped_fp8_gemm),
    version=1,
    constant=("experts", "n", "k", "kind", "act", "dtype", "align"),
    variable={"rows": "x[0]"},
    inputs=_grouped_inputs,
    cases=(
        *(
            case(name, rows=rows, experts=experts, n=n, k=k, kind=kind, act=act, dtype=dtype)
            for name, rows, experts, n, k, kind, act, dtype in (
                ("empty", 0, 2, 64, 64, "bfloat16", "none", torch.bfloat16),
                ("one", 1, 3, 65, 96, "bfloat16", "none", torch.bfloat16),
                ("odd", 63, 8, 40, 72, "float32", "none", torch.float32),
                ("fp8", 65, 4, 192, 256, "fp8", "fp8_pow2", torch.bfloat16),
                ("fp8_plain", 33, 4, 128, 384, "fp8", "fp8", torch.float32),
                ("fp8_weight", 17, 3, 130, 200, "fp8", "none", torch.bfloat16),
                ("round_only", 20, 4, 64, 256, "bfloat16", "fp8_pow2", torch.bfloat16),
            )
        ),
        case("padded", rows=200, experts=5, n=128, k=128, kind="fp8", act="fp8_pow2",
             dtype=torch.bfloat16, align=64, seed=2),
        case("gate_up", model=True, rows=4096, experts=32, n=4096, k=7168, kind="fp8",
             act="fp8_pow2", dtype=torch.bfloat16, align=128),
        case("down", model=True, rows=4096, experts=32, n=7168, k=2048, kind="fp8",
             act="fp8_pow2", dtype=torch.bfloat16, align=128),
    ),
    check=by_act(5e-6),
    cost=_grouped_cost,
    invalid=_grouped_invalid,
    unread=_grouped_unread,
)  # fmt: skip
def grouped_linear(
    x: Tensor, weight: list[Tensor], grouped_layout: Tensor, *, act: str = "none"
) -> Tensor:
    """`linear` of each row with its own expert's weight.

    x               [rows, k] bf16, fp16 or fp32
    weight          packed [experts, n, k], as in `linear`
    grouped_layout  [rows] int32: the row's expert, or -1 for a padding row, as in `grouped_gemm`
    act             as in `linear`
    -> out          [rows, n] x's dtype; padding rows zero

    Source: `linear` of the model's demo code, over the rows of DeepGEMM's contiguous layout.
    """
    if len(weight) == 2 and act != "none":
        values, scale = quantize_fp8(x, pow2=act == "fp8_pow2")
        return grouped_fp8_gemm(
            values, scale, weight[0], weight[1], grouped_layout, out_dtype=x.dtype
        )
    stack = weight[0]
    if len(weight) == 2:
        stack = dequantize_fp8(weight[0], weight[1], block_rows=BLOCK, out_dtype=x.dtype)
    both = torch.promote_types(x.dtype, stack.dtype)
    x_both = rounded(x, act).to(both)
    return grouped_gemm(x_both, stack.to(both), grouped_layout).to(x.dtype)
