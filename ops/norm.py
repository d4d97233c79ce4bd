"""Norms, rotary positions, the Hadamard transform and the gated activation: by rows, fp32 inside.

Weights may be fp32 while activations are not, as in the model.
"""

import torch
from torch import Tensor
from torch.nn import functional

from dsa_hal.case import Cost, Inputs, Maker, case
from dsa_hal.check import Comparison, Finding, close, each
from dsa_hal.ops._contract import floats, shaped
from dsa_hal.registry import op


def one_rounding(*, abs: float = 1e-5) -> Comparison:
    """Values that differ by fp32 noise (`abs`, or 1e-5 of the value) before one rounding to the
    output's dtype: at most one step of it apart."""

    def compare(name: str, got: Tensor, want: Tensor) -> list[Finding]:
        rel = {torch.float32: 1e-5, torch.float16: 2.01 / 2048}.get(want.dtype, 2.01 / 256)
        return close(abs=abs, rel=rel)(name, got, want)

    return compare


def _weights_wrong(x: Tensor, **weights: Tensor) -> str | None:
    if wrong := floats(x=x):
        return wrong
    if x.dim() < 1:
        return "x has no axes; expected [..., dim]"
    for name, weight in weights.items():
        if weight.dtype not in (torch.float32, x.dtype):
            return f"{name} is {weight.dtype}; expected float32 or x's {x.dtype}"
        if wrong := shaped(name, weight, x.shape[-1]):
            return wrong
    return None


_ROWS = (
    *(
        case(name, tokens=tokens, heads=heads, dim=dim, dtype=dtype, fp32=fp32)
        for name, tokens, heads, dim, dtype, fp32 in (
            ("empty", 0, 0, 64, torch.bfloat16, True),
            ("one", 1, 0, 96, torch.bfloat16, True),
            ("odd", 63, 0, 40, torch.float32, True),
            ("same_dtype", 65, 0, 128, torch.bfloat16, False),
            ("half", 3, 0, 72, torch.float16, False),
            ("heads", 5, 7, 48, torch.bfloat16, True),
        )
    ),
    case("zero_row", tokens=3, heads=0, dim=64, dtype=torch.bfloat16, fp32=True, zero=True),
)

_MODEL_ROWS = tuple(
    case(f"{name}_m{tokens}", model=True, tokens=tokens, heads=0, dim=dim, dtype=torch.bfloat16,
         fp32=True)
    for name, dim, counts in (
        ("hidden", 7168, (1, 64, 4096)), ("q_lora", 1536, (1, 64)), ("kv_lora", 512, (1, 64))
    )
    for tokens in counts
)  # fmt: skip


def _make_rows(
    make: Maker, tokens: int, heads: int, dim: int, dtype: torch.dtype, zero: bool
) -> Tensor:
    """Rows of very different size and with a mean, the last one zero if asked for."""
    shape = (tokens, heads, dim) if heads else (tokens, dim)
    x = (make.randn(*shape, scale=2.0) + 0.5) * make.randn(*shape[:-1], 1).exp2() ** 3
    if zero:
        x[-1] = 0
    return x.to(dtype)


def _make_weight(make: Maker, dim: int, dtype: torch.dtype, fp32: bool) -> Tensor:
    return make.randn(dim, dtype=torch.float32 if fp32 else dtype)


# -- rms_norm -----------------------------------------------------------------------------------


def _rms_inputs(
    make: Maker, *, tokens: int, heads: int, dim: int, dtype: torch.dtype, fp32: bool,
    zero: bool = False,
) -> Inputs:  # fmt: skip
    x = _make_rows(make, tokens, heads, dim, dtype, zero)
    return dict(x=x, weight=_make_weight(make, dim, dtype, fp32))


def _rms_cost(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Cost:
    return Cost(4.0 * x.numel(), 2 * x.numel() * x.element_size())


def _rms_invalid(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> str | None:
    return _weights_wrong(x, weight=weight)


@op(
    version=1,
    constant=("heads", "dim", "dtype", "fp32", "zero"),
    variable={"tokens": "x[0]"},
    inputs=_rms_inputs,
    cases=(*_ROWS, *_MODEL_ROWS),
    check=each(out=one_rounding()),
    cost=_rms_cost,
    invalid=_rms_invalid,
)
def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, rounded once.

    x       [..., dim] bf16, fp16 or fp32
    weight  [dim] fp32 or x's dtype
    -> out  like x

    Source: `RMSNorm` of the model's demo code.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


# -- add_rms_norm -------------------------------------------------------------------------------


def _add_inputs(
    make: Maker, *, tokens: int, heads: int, dim: int, dtype: torch.dtype, fp32: bool,
    zero: bool = False,
) -> Inputs:  # fmt: skip
    x, residual = (_make_rows(make, tokens, heads, dim, dtype, zero) for _ in range(2))
    return dict(x=x, residual=residual, weight=_make_weight(make, dim, dtype, fp32))


def _add_cost(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Cost:
    return Cost(5.0 * x.numel(), 4 * x.numel() * x.element_size())


def _add_invalid(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-6) -> str | None:
    if x.dtype != residual.dtype:
        return f"residual is {residual.dtype}; expected x's {x.dtype}"
    return _weights_wrong(x, weight=weight) or shaped("residual", residual, *x.shape)


@op(
    version=1,
    constant=("heads", "dim", "dtype", "fp32", "zero"),
    variable={"tokens": "x[0]"},
    inputs=_add_inputs,
    cases=(*_ROWS, *_MODEL_ROWS),
    check=each(out=one_rounding(), residual=one_rounding()),
    cost=_add_cost,
    outputs=("out", "residual"),
    invalid=_add_invalid,
)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and that sum as the next residual.

    x, residual  [..., dim] of one dtype
    weight       [dim] fp32 or x's dtype
    eps          is added to the mean square
    -> out       like x: the norm of the fp32 sum, not of the rounded one
    -> residual  like x: the sum, rounded

    Source: `RMSNorm` of the model's demo code, called with a residual.
    """
    total = x.float() + residual.float()
    wide = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype), total.to(x.dtype)


# -- layer_norm ---------------------------------------------------------------------------------


def _layer_inputs(
    make: Maker, *, tokens: int, heads: int, dim: int, dtype: torch.dtype, fp32: bool,
    zero: bool = False,
) -> Inputs:  # fmt: skip
    x = _make_rows(make, tokens, heads, dim, dtype, zero)
    weight, bias = (_make_weight(make, dim, dtype, fp32) for _ in range(2))
    return dict(x=x, weight=weight, bias=bias)


def _layer_cost(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Cost:
    return Cost(6.0 * x.numel(), 2 * x.numel() * x.element_size())


def _layer_invalid(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> str | None:
    return _weights_wrong(x, weight=weight, bias=bias)


@op(
    version=1,
    constant=("heads", "dim", "dtype", "fp32", "zero"),
    variable={"tokens": "x[0]"},
    inputs=_layer_inputs,
    cases=(
        *_ROWS,
        *(
            case(f"index_key_m{tokens}", model=True, tokens=tokens, heads=0, dim=128,
                 dtype=torch.bfloat16, fp32=True, traps=(2,))
            for tokens in (1, 64, 4096)
        ),
    ),
    check=each(out=one_rounding(abs=2e-5)),
    cost=_layer_cost,
    invalid=_layer_invalid,
)  # fmt: skip
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, rounded once.

    x             [..., dim] bf16, fp16 or fp32
    weight, bias  [dim] fp32 or x's dtype
    -> out        like x; the variance is the biased one

    Source: `LayerNorm` of the model's demo code.
    """
    wide = x.float()
    wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.float() + bias.float()).to(x.dtype)


# -- rope ---------------------------------------------------------------------------------------


def make_cos_sin(make: Maker, positions: int, dim: int) -> Tensor:
    """A rotary table [positions, dim] fp32: cosines, then sines."""
    angle = make.randn(positions, dim // 2, scale=3.0)
    return torch.cat([angle.cos(), angle.sin()], -1)


def _rope_inputs(
    make: Maker, *, tokens: int, heads: int, dim: int, rope_dim: int, offset: int,
    interleaved: bool, dtype: torch.dtype, long: bool = False,
) -> Inputs:  # fmt: skip
    shape = (tokens, heads, dim) if heads else (tokens, dim)
    table = 97  # positions repeat and come in any order
    return dict(
        x=make.randn(*shape, dtype=dtype),
        positions=make.randint(0, table, tokens, dtype=torch.int64 if long else torch.int32),
        cos_sin=make_cos_sin(make, table, rope_dim),
        interleaved=interleaved,
        offset=offset,
    )


def _rope_cost(
    x: Tensor, positions: Tensor, cos_sin: Tensor, *, interleaved: bool, offset: int = 0
) -> Cost:
    turned = x.numel() / x.shape[-1] * cos_sin.shape[1]
    return Cost(3.0 * turned, 2 * x.numel() * x.element_size() + 4 * positions.numel())


def rope_wrong(positions: Tensor, cos_sin: Tensor, tokens: int, room: int) -> str | None:
    """Why a rotary table and positions do not fit `tokens` rows with `room` columns to rotate."""
    if positions.dtype not in (torch.int32, torch.int64) or cos_sin.dtype != torch.float32:
        return (
            f"positions are {positions.dtype}, cos_sin {cos_sin.dtype};"
            " expected int32 or int64, and float32"
        )
    if cos_sin.dim() != 2 or cos_sin.shape[1] % 2 or not 0 < cos_sin.shape[1] <= room:
        return (
            f"cos_sin has shape {list(cos_sin.shape)};"
            f" expected [max_position, an even number up to {room}]"
        )
    return shaped("positions", positions, tokens)


def _rope_invalid(
    x: Tensor, positions: Tensor, cos_sin: Tensor, *, interleaved: bool, offset: int = 0
) -> str | None:
    if x.dim() not in (2, 3):
        return f"x has shape {list(x.shape)}; expected [tokens, heads, dim] or [tokens, dim]"
    if offset < 0:
        return f"offset is {offset}; expected 0 or more"
    return floats(x=x) or rope_wrong(positions, cos_sin, x.shape[0], x.shape[-1] - offset)


@op(
    version=1,
    constant=("heads", "dim", "rope_dim", "offset", "interleaved", "dtype", "long"),
    variable={"tokens": "x[0]"},
    inputs=_rope_inputs,
    cases=(
        *(
            case(name, tokens=tokens, heads=heads, dim=dim, rope_dim=rope, offset=offset,
                 interleaved=interleaved, dtype=dtype)
            for name, tokens, heads, dim, rope, offset, interleaved, dtype in (
                ("empty", 0, 2, 24, 8, 16, True, torch.bfloat16),
                ("one", 1, 3, 24, 8, 16, True, torch.bfloat16),
                ("odd", 63, 5, 24, 8, 0, False, torch.float32),
                ("middle", 9, 2, 40, 12, 20, True, torch.float32),
                ("no_heads", 65, 0, 72, 8, 64, True, torch.bfloat16),
                ("whole", 7, 2, 16, 16, 0, False, torch.float16),
            )
        ),
        case("long", tokens=5, heads=2, dim=16, rope_dim=8, offset=0, interleaved=False,
             dtype=torch.bfloat16, long=True),
        *(
            case(f"{name}_m{tokens}", model=True, tokens=tokens, heads=heads, dim=dim, rope_dim=64,
                 offset=offset, interleaved=interleaved, dtype=torch.bfloat16, traps=traps)
            for name, heads, dim, offset, interleaved, traps in (
                ("mla_q", 128, 192, 128, True, (1,)),
                ("mla_k", 0, 576, 512, True, (1,)),
                ("index_q", 64, 128, 0, False, (1, 25)),
                ("index_k_interleaved", 0, 128, 0, True, (25,)),
            )
            for tokens in (1, 64, 4096)
        ),
    ),
    check=each(out=one_rounding()),
    cost=_rope_cost,
    invalid=_rope_invalid,
)  # fmt: skip
def rope(
    x: Tensor, positions: Tensor, cos_sin: Tensor, *, interleaved: bool, offset: int = 0
) -> Tensor:
    """Rotate columns [offset, offset + rope_dim) of x by each token's position; copy the others.

    x            [tokens, heads, dim] or [tokens, dim] bf16, fp16 or fp32
    positions    [tokens] int32 or int64 in [0, max_position); another value is an error
    cos_sin      [max_position, rope_dim] fp32: rope_dim / 2 cosines, then as many sines
    interleaved  pairs are columns (2i, 2i + 1), as in MLA; else (i, i + rope_dim / 2), as in the
                 indexer. The result keeps x's order of columns
    -> out       like x, rotated in fp32

    Source: `apply_rotary_emb` of the model's demo code after its erratum of November 2025.
    """
    width = cos_sin.shape[1]
    cos, sin = cos_sin[positions.long()].chunk(2, -1)
    if x.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    turn = x[..., offset : offset + width].float()
    if interleaved:
        a, b = turn[..., 0::2], turn[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turn.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([x[..., :offset], turned.to(x.dtype), x[..., offset + width :]], -1)


# -- hadamard -----------------------------------------------------------------------------------


def _hadamard_inputs(
    make: Maker, *, tokens: int, heads: int, dim: int, dtype: torch.dtype
) -> Inputs:
    x = make.randn(*((tokens, heads, dim) if heads else (tokens, dim)), dtype=dtype)
    x[..., ::13] *= 20
    return dict(x=x)


def _hadamard_cost(x: Tensor) -> Cost:
    return Cost(x.numel() * max(1, x.shape[-1].bit_length() - 1), 2 * x.numel() * x.element_size())


def _hadamard_invalid(x: Tensor) -> str | None:
    if x.dim() < 1 or x.shape[-1] < 1 or x.shape[-1] & (x.shape[-1] - 1):
        return f"x has shape {list(x.shape)}; the last axis must be a power of two"
    return floats(x=x)


@op(
    version=1,
    constant=("heads", "dim", "dtype"),
    variable={"tokens": "x[0]"},
    inputs=_hadamard_inputs,
    cases=(
        *(
            case(name, tokens=tokens, heads=heads, dim=dim, dtype=dtype)
            for name, tokens, heads, dim, dtype in (
                ("empty", 0, 0, 64, torch.bfloat16),
                ("one", 1, 0, 1, torch.float32),
                ("two", 3, 0, 2, torch.float32),
                ("odd", 63, 0, 32, torch.float32),
                ("half", 5, 3, 128, torch.float16),
                ("wide", 4, 0, 2048, torch.float32),
            )
        ),
        *(
            case(f"{name}_m{tokens}", model=True, tokens=tokens, heads=heads, dim=128,
                 dtype=torch.bfloat16, traps=(2,))
            for name, heads in (("index_q", 64), ("index_k", 0))
            for tokens in (1, 64, 4096)
        ),
    ),
    check=each(out=one_rounding(abs=2e-5)),
    cost=_hadamard_cost,
    invalid=_hadamard_invalid,
)  # fmt: skip
def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of the last axis, its own inverse.

    x       [..., dim] bf16, fp16 or fp32; dim a power of two
    -> out  like x: x @ H * dim^-0.5 with H in Sylvester's order (H[i, j] = -1 to the number of bits
            that i and j share), in fp32, rounded once

    Source: `rotate_activation` of the model's demo code.
    """
    dim = x.shape[-1]
    wide: Tensor = x.float()
    for bit in range(dim.bit_length() - 1):
        pairs = wide.reshape(*x.shape[:-1], dim >> (bit + 1), 2, 1 << bit)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        wide = torch.stack([low + high, low - high], -2)
    return wide.reshape(x.shape).mul(dim**-0.5).to(x.dtype)


# -- silu_mul -----------------------------------------------------------------------------------


def _silu_inputs(make: Maker, *, tokens: int, inter: int, dtype: torch.dtype) -> Inputs:
    return dict(x=make.randn(tokens, 2 * inter, dtype=dtype, scale=3.0))


def _silu_cost(x: Tensor) -> Cost:
    return Cost(3.0 * x.numel(), 1.5 * x.numel() * x.element_size())


def _silu_invalid(x: Tensor) -> str | None:
    if x.dim() != 2 or x.shape[1] % 2:
        return f"x has shape {list(x.shape)}; expected [tokens, gate and up of equal width]"
    return floats(x=x)


@op(
    version=1,
    constant=("inter", "dtype"),
    variable={"tokens": "x[0]"},
    inputs=_silu_inputs,
    cases=(
        case("empty", tokens=0, inter=32, dtype=torch.bfloat16),
        case("one", tokens=1, inter=33, dtype=torch.bfloat16),
        case("odd", tokens=63, inter=40, dtype=torch.float32),
        case("half", tokens=65, inter=24, dtype=torch.float16),
        *(
            case(f"{name}_m{tokens}", model=True, tokens=tokens, inter=inter, dtype=torch.bfloat16)
            for name, inter in (("expert", 2048), ("dense", 18432))
            for tokens in (1, 64, 4096)
        ),
    ),
    check=each(out=one_rounding(abs=1e-6)),
    cost=_silu_cost,
    invalid=_silu_invalid,
)
def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) * up, in fp32 and rounded once.

    x       [tokens, 2 * inter] bf16, fp16 or fp32: gate columns, then up columns
    -> out  [tokens, inter] x's dtype

    Source: `Expert` and `MLP` of the model's demo code.
    """
    gate, up = x.float().chunk(2, -1)
    return (functional.silu(gate) * up).to(x.dtype)
