"""The small steps around attention and experts as one op each, so that a backend may fuse them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsa_hal.case import Cost, Inputs, Maker, case
from dsa_hal.check import Finding, Report, calc_diff, each, form
from dsa_hal.ops._contract import floats, shaped, typed
from dsa_hal.ops.norm import (
    hadamard,
    layer_norm,
    make_cos_sin,
    one_rounding,
    rms_norm,
    rope,
    rope_wrong,
    silu_mul,
)  # fmt: skip
from dsa_hal.ops.quant import quantize_fp8, quantize_int8, spread
from dsa_hal.registry import composite

RECODED = 5e-4
"""calc_diff between FP8 values of equal meaning, where one side rounds before it quantises and the
other does not: a few codes in a hundred differ by a step."""

# -- silu_mul_quantize --------------------------------------------------------------------------


def _silu_inputs(make: Maker, *, tokens: int, inter: int, pow2: bool, dtype: torch.dtype) -> Inputs:
    return dict(x=make.randn(tokens, 2 * inter, dtype=dtype, scale=3.0), pow2=pow2)


def _silu_cost(x: Tensor, *, pow2: bool = True) -> Cost:
    return Cost(5.0 * x.numel(), x.numel() * (x.element_size() + 0.5))


def _silu_invalid(x: Tensor, *, pow2: bool = True) -> str | None:
    return silu_mul.invalid(x)


def _quantized(got: Sequence[Tensor], want: Sequence[Tensor], inputs: Inputs) -> Report:
    """What values and scales mean together. Where the largest value of a group is rounded across a
    power of two, its scale may be the neighbour."""
    if len(got) != 2:
        return Report((Finding("results", "count", str(len(got)), "2", False),))
    if wrong := [*form("values", got[0], want[0]), *form("scale", got[1], want[1])]:
        return Report(tuple(wrong))
    rows, cols = got[0].shape
    meaning = [v.float() * spread(s, rows, cols, 1, 128) for v, s in (got, want)]
    apart, limit = (got[1] / want[1]).log2().abs(), 1.0 if inputs["pow2"] else 0.02
    far = float((~(apart <= limit)).sum())
    step = 2.0**-8 * torch.maximum(got[1], want[1])
    limits = 0.126 * meaning[1].abs() + spread(step, rows, cols, 1, 128)
    steps = float((~((meaning[0] - meaning[1]).abs() <= limits)).sum())
    odd = float((got[1].frexp().mantissa != 0.5).sum()) if inputs["pow2"] else 0.0
    return Report((
        *calc_diff(RECODED)("values * scale", *meaning),
        Finding("values", "more than one code off", steps, 0.0, steps == 0),
        Finding("scale", f"more than {limit:g} octaves off", far, 0.0, far == 0),
        Finding("scale", "other than powers of two", odd, 0.0, odd == 0),
    ))  # fmt: skip


@composite(
    uses=(silu_mul, quantize_fp8),
    version=1,
    constant=("inter", "pow2", "dtype"),
    variable={"tokens": "x[0]"},
    inputs=_silu_inputs,
    cases=(
        case("empty", tokens=0, inter=128, pow2=True, dtype=torch.bfloat16),
        case("one", tokens=1, inter=128, pow2=True, dtype=torch.bfloat16),
        case("odd", tokens=63, inter=200, pow2=False, dtype=torch.float32),
        case("more", tokens=65, inter=384, pow2=True, dtype=torch.bfloat16),
        *(
            case(f"{name}_m{tokens}", model=True, tokens=tokens, inter=inter, pow2=True,
                 dtype=torch.bfloat16)
            for name, inter in (("expert", 2048), ("dense", 18432))
            for tokens in (1, 64, 4096)
        ),
    ),
    check=_quantized,
    cost=_silu_cost,
    outputs=("values", "scale"),
    invalid=_silu_invalid,
)  # fmt: skip
def silu_mul_quantize(x: Tensor, *, pow2: bool = True) -> tuple[Tensor, Tensor]:
    """`silu_mul`, quantised as the next product wants it.

    x          [tokens, 2 * inter] bf16, fp16 or fp32: gate columns, then up columns
    pow2       scales rounded up to powers of two
    -> values  [tokens, inter] float8_e4m3fn
    -> scale   [tokens, ceil(inter / 128)] fp32

    Source: `Expert` and `act_quant` of the model's demo code; TileKernels fuses them as well.
    """
    return quantize_fp8(silu_mul(x), pow2=pow2)


# -- indexer_qk ---------------------------------------------------------------------------------

QUANTIZE = ("fp8", "int8", "none")
"""What the indexer's queries become, which is what its cache holds."""


def _indexer_inputs(
    make: Maker, *, tokens: int, heads: int, dim: int, rope_dim: int, interleaved: bool,
    quantize: str, pow2: bool, dtype: torch.dtype,
) -> Inputs:  # fmt: skip
    q = make.randn(tokens, heads, dim, dtype=dtype)
    q[..., ::31] *= 20
    return dict(
        q=q.flatten(1),
        k=make.randn(tokens, dim, dtype=dtype, scale=3.0) + 1.0,
        weights=make.randn(tokens, heads),
        k_weight=make.randn(dim),
        k_bias=make.randn(dim),
        positions=make.randint(0, 97, tokens),
        cos_sin=make_cos_sin(make, 97, rope_dim),
        interleaved=interleaved,
        quantize=quantize,
        pow2=pow2,
    )


def _indexer_cost(
    q: Tensor, k: Tensor, weights: Tensor, k_weight: Tensor, k_bias: Tensor, positions: Tensor,
    cos_sin: Tensor, *, interleaved: bool = False, quantize: str = "fp8", pow2: bool = True,
    eps: float = 1e-6,
) -> Cost:  # fmt: skip
    written = q.numel() * (q.element_size() if quantize == "none" else 1)
    read = (q.numel() + 2 * k.numel()) * q.element_size() + 8 * weights.numel()
    return Cost(12.0 * (q.numel() + k.numel()), read + written)


def _indexer_invalid(
    q: Tensor, k: Tensor, weights: Tensor, k_weight: Tensor, k_bias: Tensor, positions: Tensor,
    cos_sin: Tensor, *, interleaved: bool = False, quantize: str = "fp8", pow2: bool = True,
    eps: float = 1e-6,
) -> str | None:  # fmt: skip
    if wrong := shaped("k", k, "tokens", "dim"):
        return wrong
    tokens, dim = k.shape
    if wrong := shaped("weights", weights, tokens, "heads"):
        return wrong
    if quantize not in QUANTIZE:
        return f"quantize is {quantize!r}; expected one of {', '.join(QUANTIZE)}"
    if quantize != "none" and dim & (dim - 1):
        return f"dim is {dim}; the Hadamard transform needs a power of two"
    return (
        shaped("q", q, tokens, weights.shape[1] * dim)
        or floats(q=q)
        or typed(q.dtype, k=k)
        or typed(torch.float32, weights=weights)
        or layer_norm.invalid(k, k_weight, k_bias)
        or rope_wrong(positions, cos_sin, tokens, dim)
    )


def _indexer_check(got: Sequence[Tensor], want: Sequence[Tensor], inputs: Inputs) -> Report:
    """Scales live inside the weights, so q is judged together with their size, and a weight's sign
    (which the ReLU keeps apart from q's) on its own."""
    plain = each(q=calc_diff(1e-5), k=calc_diff(1e-5), weights=one_rounding())
    if inputs["quantize"] == "none":
        return plain(got, want, inputs)
    if len(got) != 3:
        return Report((Finding("results", "count", str(len(got)), "3", False),))
    names = ("q", "k", "weights")
    if wrong := [f for n, g, w in zip(names, got, want, strict=True) for f in form(n, g, w)]:
        return Report(tuple(wrong))
    meaning = [q.float() * w.abs()[..., None] for q, _, w in (got, want)]
    flipped = float((got[2].sign() != want[2].sign()).sum())
    return Report((
        *calc_diff(RECODED)("q * |weights|", *meaning),
        Finding("weights", "wrong signs", flipped, 0.0, flipped == 0),
        *calc_diff(1e-5)("k", got[1], want[1]),
    ))  # fmt: skip


@composite(
    uses=(layer_norm, rope, hadamard, quantize_fp8),
    version=2,
    constant=("heads", "dim", "rope_dim", "interleaved", "quantize", "pow2", "dtype"),
    variable={"tokens": "q[0]"},
    inputs=_indexer_inputs,
    cases=(
        *(
            case(name, tokens=tokens, heads=heads, dim=dim, rope_dim=rope_dim, dtype=dtype,
                 interleaved=interleaved, quantize=quantize, pow2=pow2, traps=traps)
            for name, tokens, heads, dim, rope_dim, dtype, interleaved, quantize, pow2, traps in (
                ("empty", 0, 4, 64, 32, torch.bfloat16, False, "fp8", True, ()),
                ("one", 1, 4, 64, 32, torch.bfloat16, False, "fp8", True, ()),
                ("odd", 63, 3, 128, 64, torch.float32, False, "fp8", False, (4,)),
                ("more", 65, 8, 32, 8, torch.bfloat16, True, "fp8", True, (25,)),
                ("int8", 19, 4, 128, 64, torch.bfloat16, False, "int8", True, (4,)),
                ("float", 9, 4, 48, 16, torch.bfloat16, False, "none", True, (1, 2)),
                ("float_fp32", 9, 4, 64, 64, torch.float32, True, "none", True, (25,)),
            )
        ),
        *(
            case(f"model_m{tokens}", model=True, tokens=tokens, heads=64, dim=128, rope_dim=64,
                 dtype=torch.bfloat16, interleaved=False, quantize="fp8", pow2=True,
                 traps=(1, 2, 4))
            for tokens in (1, 64, 4096)
        ),
    ),
    check=_indexer_check,
    cost=_indexer_cost,
    outputs=("q", "k", "weights"),
    invalid=_indexer_invalid,
)  # fmt: skip
def indexer_qk(
    q: Tensor, k: Tensor, weights: Tensor, k_weight: Tensor, k_bias: Tensor, positions: Tensor,
    cos_sin: Tensor, *, interleaved: bool = False, quantize: str = "fp8", pow2: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """From the indexer's projections to what `indexer_logits` and the index cache take.

    Heads are [rope | rest], the rotated part first, unlike MLA's. The Hadamard transform leaves
    every product q . k as it is and only spreads outliers, so it is done when quantising alone.

    q            [tokens, heads * dim] bf16, fp16 or fp32
    k            [tokens, dim] q's dtype: LayerNorm with k_weight, k_bias [dim] and eps first
    weights      [tokens, heads] fp32 as projected, signed
    positions    [tokens] int32 or int64
    cos_sin      [max_position, rope_dim] fp32, as in `rope`
    interleaved  as in `rope`; false for this model, true for the GLM family
    quantize     "fp8" or "int8": Hadamard, then q to codes with one scale per token and head, those
                 of int8 as `quantize_int8` says; "none"
    pow2         the scales of FP8 are powers of two
    -> q         [tokens, heads, dim] float8_e4m3fn, int8, or q's dtype for "none"
    -> k         [tokens, dim] q's dtype; the cache's store quantises it
    -> weights   [tokens, heads] fp32, times q's scale, heads^-0.5 and dim^-0.5

    Source: `Indexer` of the model's demo code.
    """
    tokens, heads = weights.shape
    dim = k.shape[1]
    turned = rope(q.view(tokens, heads, dim), positions, cos_sin, interleaved=interleaved)
    k = rope(layer_norm(k, k_weight, k_bias, eps=eps), positions, cos_sin, interleaved=interleaved)
    weights = weights * (heads * dim) ** -0.5
    if quantize == "none":
        return turned, k, weights
    spread_out = hadamard(turned)
    if quantize == "int8":
        values, scale = quantize_int8(spread_out, group=dim)
    else:
        values, scale = quantize_fp8(spread_out, group=dim, pow2=pow2)
    return values, hadamard(k), weights * scale.squeeze(-1)


# -- latent_qkv ---------------------------------------------------------------------------------


def _latent_inputs(
    make: Maker, *, tokens: int, q_lora: int, lora: int, rope_dim: int, dtype: torch.dtype
) -> Inputs:
    return dict(
        q_a=make.randn(tokens, q_lora, dtype=dtype, scale=3.0),
        kv_a=make.randn(tokens, lora + rope_dim, dtype=dtype, scale=0.3),
        q_weight=make.randn(q_lora),
        kv_weight=make.randn(lora),
        positions=make.randint(0, 97, tokens),
        cos_sin=make_cos_sin(make, 97, rope_dim),
    )


def _latent_cost(
    q_a: Tensor, kv_a: Tensor, q_weight: Tensor, kv_weight: Tensor, positions: Tensor,
    cos_sin: Tensor, *, eps: float = 1e-6,
) -> Cost:  # fmt: skip
    numbers = q_a.numel() + kv_a.numel()
    return Cost(4.0 * numbers, 2 * numbers * q_a.element_size())


def _latent_invalid(
    q_a: Tensor, kv_a: Tensor, q_weight: Tensor, kv_weight: Tensor, positions: Tensor,
    cos_sin: Tensor, *, eps: float = 1e-6,
) -> str | None:  # fmt: skip
    if wrong := shaped("q_a", q_a, "tokens", "q_lora") or floats(q_a=q_a):
        return wrong
    if wrong := rms_norm.invalid(q_a, q_weight) or typed(q_a.dtype, kv_a=kv_a):
        return wrong
    if kv_weight.dim() != 1 or cos_sin.dim() != 2:
        return (
            f"kv_weight has shape {list(kv_weight.shape)}, cos_sin {list(cos_sin.shape)};"
            " expected [lora] and [max_position, rope_dim]"
        )
    lora, tokens = kv_weight.shape[0], q_a.shape[0]
    return (
        shaped("kv_a", kv_a, tokens, lora + cos_sin.shape[1])
        or rms_norm.invalid(kv_a[:, :lora], kv_weight)
        or rope_wrong(positions, cos_sin, tokens, cos_sin.shape[1])
    )


@composite(
    uses=(rms_norm, rope),
    version=1,
    constant=("q_lora", "lora", "rope_dim", "dtype"),
    variable={"tokens": "q_a[0]"},
    inputs=_latent_inputs,
    cases=(
        case("empty", tokens=0, q_lora=48, lora=32, rope_dim=16, dtype=torch.bfloat16),
        case("one", tokens=1, q_lora=48, lora=32, rope_dim=16, dtype=torch.bfloat16),
        case("odd", tokens=63, q_lora=40, lora=72, rope_dim=8, dtype=torch.float32),
        case("more", tokens=65, q_lora=128, lora=128, rope_dim=64, dtype=torch.bfloat16),
        *(
            case(f"model_m{tokens}", model=True, tokens=tokens, q_lora=1536, lora=512, rope_dim=64,
                 dtype=torch.bfloat16, traps=(1,))
            for tokens in (1, 64, 4096)
        ),
    ),
    check=each(qr=one_rounding(), latent=one_rounding()),
    cost=_latent_cost,
    outputs=("qr", "latent"),
    invalid=_latent_invalid,
)  # fmt: skip
def latent_qkv(
    q_a: Tensor, kv_a: Tensor, q_weight: Tensor, kv_weight: Tensor, positions: Tensor,
    cos_sin: Tensor, *, eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """From the down-projections of attention to the compressed query and the cache's latent.

    q_a        [tokens, q_lora] bf16, fp16 or fp32
    kv_a       [tokens, lora + rope_dim] q_a's dtype: latent, then the shared key's rotary part
    q_weight   [q_lora], kv_weight [lora]: RMS norms with eps, fp32 or q_a's dtype
    positions  [tokens] int32 or int64
    cos_sin    [max_position, rope_dim] fp32, as in `rope`; applied interleaved, as MLA is
    -> qr      [tokens, q_lora] q_a's dtype
    -> latent  [tokens, lora + rope_dim] q_a's dtype: normed latent, then the rotated part

    Source: `MLA` of the model's demo code, steps up to the cache.
    """
    lora = kv_weight.shape[0]
    latent = rms_norm(kv_a[:, :lora], kv_weight, eps=eps)
    tail = rope(kv_a[:, lora:], positions, cos_sin, interleaved=True)
    return rms_norm(q_a, q_weight, eps=eps), torch.cat([latent, tail], -1)
