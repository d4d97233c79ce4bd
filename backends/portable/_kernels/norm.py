"""Norms by rows, with or without a residual, and those of attention's down-projections."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_hal.backends.portable._kernels.rope import positions_of, table_of, turned
from dsa_hal.backends.portable.rows import dense, flat, pick, power_of_two


def normed(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """`rms_norm`, `layer_norm` (with a bias) and `add_rms_norm` (with a residual), with the tile of
    the op called `op`: the norm, and the sum if there is a residual."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(out)
    if not out.numel():
        return out, total
    x = flat(x)
    residual = None if residual is None else flat(residual)
    rows, dim = x.shape
    width = power_of_two(dim)
    tile = pick(op, rows, width)
    _norm[(triton.cdiv(rows, tile.rows),)](
        x, residual, dense(weight), None if bias is None else dense(bias), out, total, rows, dim,
        x.stride(0), 0 if residual is None else residual.stride(0), eps,
        ROWS=tile.rows, WIDTH=width, **tile.options,
    )  # fmt: skip
    return out, total


def latents(
    q_a: Tensor, kv_a: Tensor, q_weight: Tensor, kv_weight: Tensor, positions: Tensor,
    cos_sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`latent_qkv`: programs for queries and for latents in one launch."""
    qr, latent = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q_a, kv_a))
    tokens, q_lora = q_a.shape
    lora, rotary = kv_weight.shape[0], cos_sin.shape[1]
    if not tokens:
        return qr, latent
    q_a, kv_a, cos_sin = dense(q_a), dense(kv_a), dense(cos_sin)
    width, lora_width = power_of_two(q_lora), power_of_two(lora)
    tile = pick("latent_qkv", tokens, max(width, lora_width))
    _latents[(2 * triton.cdiv(tokens, tile.rows),)](
        q_a, kv_a, dense(q_weight), dense(kv_weight), dense(positions), cos_sin, qr, latent,
        tokens, cos_sin.shape[0], q_a.stride(0), kv_a.stride(0), cos_sin.stride(0), eps,
        Q_LORA=q_lora, LORA=lora, ROTARY=rotary, Q_WIDTH=width, LORA_WIDTH=lora_width,
        HALF=power_of_two(rotary // 2), ROWS=tile.rows, **tile.options,
    )  # fmt: skip
    return qr, latent


@triton.jit
def rms(wide, dim, eps):
    """1 / root mean square of each row [rows, 1]; columns beyond `dim` are 0."""
    return tl.rsqrt(tl.sum(wide * wide, 1) / dim + eps)[:, None]


@triton.jit(do_not_specialize=["rows"])
def _norm(
    x, residual, weight, bias, out, total, rows, dim, x_stride, residual_stride, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, WIDTH)
    filled = column < dim
    inside = (row < rows)[:, None] & filled[None, :]
    at = row[:, None] * dim + column[None, :]
    wide = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    wide = wide.to(tl.float32)
    # Asked for before the sums, so that all of memory's answers are waited for at once.
    gain = tl.load(weight + column, mask=filled, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        other = tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=inside,
                        other=0.0)  # fmt: skip
        wide += other.to(tl.float32)
        tl.store(total + at, wide.to(total.dtype.element_ty), mask=inside)
    if bias is not None:
        shift = tl.load(bias + column, mask=filled, other=0.0).to(tl.float32)[None, :]
        wide = tl.where(inside, wide - (tl.sum(wide, 1) / dim)[:, None], 0.0)
        made = wide * rms(wide, dim, eps) * gain + shift
    else:
        made = wide * rms(wide, dim, eps) * gain
    tl.store(out + at, made.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _normed_rows(
    x, weight, out, row, ok, stride, out_stride, eps, DIM: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    filled = column < DIM
    inside = ok[:, None] & filled[None, :]
    wide = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0)
    wide = wide.to(tl.float32)
    gain = tl.load(weight + column, mask=filled, other=0.0).to(tl.float32)[None, :]
    made = (wide * rms(wide, DIM, eps) * gain).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * out_stride + column[None, :], made, mask=inside)


@triton.jit(do_not_specialize=["tokens", "positions_end"])
def _latents(
    q_a, kv_a, q_weight, kv_weight, positions, cos_sin, qr, latent, tokens, positions_end,
    q_stride, kv_stride, table_stride, eps, Q_LORA: tl.constexpr, LORA: tl.constexpr,
    ROTARY: tl.constexpr, Q_WIDTH: tl.constexpr, LORA_WIDTH: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // 2 * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    ok = row < tokens
    if tl.program_id(0) % 2 == 0:
        _normed_rows(q_a, q_weight, qr, row, ok, q_stride, Q_LORA, eps, Q_LORA, Q_WIDTH)
    else:
        pair = tl.arange(0, 2 * HALF)
        inside = ok[:, None] & (pair < ROTARY)[None, :]
        tail = tl.load(kv_a + LORA + row[:, None] * kv_stride + pair[None, :], mask=inside,
                       other=0.0)  # fmt: skip
        position = positions_of(positions, row, ok, positions_end)
        cos, sin = table_of(cos_sin, position, ok, table_stride, ROTARY, HALF)
        even, odd = tl.split(tl.reshape(tail.to(tl.float32), [ROWS, HALF, 2]))
        even, odd = turned(even, odd, cos, sin)
        made = tl.reshape(tl.join(even, odd), [ROWS, 2 * HALF]).to(latent.dtype.element_ty)
        at = latent + LORA + row[:, None] * (LORA + ROTARY) + pair[None, :]
        tl.store(at, made, mask=inside)
        _normed_rows(
            kv_a, kv_weight, latent, row, ok, kv_stride, LORA + ROTARY, eps, LORA, LORA_WIDTH
        )
