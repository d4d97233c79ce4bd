"""From the indexer's projections to its queries, keys and weights, in one launch or two.

A row is one head of one token, or one key. It is held as the two halves that are turned and the
rest, so that no element has to change places: the transform takes a part's rows of signs with it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_hal.backends.portable._kernels.hadamard import LEAST, signed_sum, signs
from dsa_hal.backends.portable._kernels.quant import encoded, scale_of
from dsa_hal.backends.portable._kernels.rope import positions_of, table_of, turned
from dsa_hal.backends.portable.rows import dense, pick, power_of_two

KEYS = tl.constexpr(16)
"""Keys per program."""

MANY = 1024
"""Tiles of queries from which keys have a launch of their own: in one program with the queries,
their steps would cost the queries half of the programs that run at once, for want of registers."""

TILES = 11
"""Tiles that a program of queries takes from then on: signs are made once, and one tile is loaded
while another is computed. At 4096 tokens all programs run at once on an H200, three to a
multiprocessor."""


def indexer(
    q: Tensor, k: Tensor, weights: Tensor, k_weight: Tensor, k_bias: Tensor, positions: Tensor,
    cos_sin: Tensor, *, interleaved: bool, quantize: bool, pow2: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`indexer_qk`."""
    (tokens, heads), dim = weights.shape, k.shape[1]
    kind = torch.float8_e4m3fn if quantize else q.dtype
    q_out = torch.empty(tokens, heads, dim, dtype=kind, device=q.device)
    k_out = torch.empty(tokens, dim, dtype=k.dtype, device=q.device)
    w_out = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    if not tokens:
        return q_out, k_out, w_out
    q, k, weights, cos_sin = dense(q), dense(k), dense(weights), dense(cos_sin)
    rows, rotary = tokens * heads, cos_sin.shape[1]
    rest, half = dim - rotary, max(LEAST.value // 2, power_of_two(rotary // 2))
    tile = pick("indexer_qk", rows, power_of_two(dim))
    parts = triton.cdiv(heads, tile.rows)
    together = tokens * parts < MANY
    tiles = 1 if together else TILES
    keys, queries = triton.cdiv(tokens, KEYS.value), triton.cdiv(tokens * parts, tiles)
    for with_keys, with_queries in [(True, True)] if together else [(True, False), (False, True)]:
        _indexer[(keys * with_keys + queries * with_queries,)](
            q, k, weights, dense(k_weight), dense(k_bias), dense(positions), cos_sin, q_out, k_out,
            w_out, keys * with_keys, tokens, heads, parts, cos_sin.shape[0], q.stride(0),
            k.stride(0), weights.stride(0), cos_sin.stride(0), eps, (heads * dim) ** -0.5,
            dim**-0.5, DIM=dim, ROTARY=rotary, HALF=half,
            REST=max(LEAST.value, power_of_two(rest)) if rest else 0,
            WIDTH=max(LEAST.value, power_of_two(dim)), INTERLEAVED=interleaved, QUANTIZE=quantize,
            POW2=pow2, ROWS=tile.rows, TILES=tiles, WITH_KEYS=with_keys,
            WITH_QUERIES=with_queries, **tile.options,
        )  # fmt: skip
    return q_out, k_out, w_out


@triton.jit
def _columns(
    DIM: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """The columns that are turned with each other, [HALF] twice; DIM stands for no column."""
    item = tl.arange(0, HALF)
    first = 2 * item if INTERLEAVED else item
    second = first + (1 if INTERLEAVED else ROTARY // 2)
    real = item < ROTARY // 2
    return tl.where(real, first, DIM), tl.where(real, second, DIM)


@triton.jit
def _load(at, ok, ROTARY: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both halves of the rows that start at `at`."""
    if INTERLEAVED:
        pair = tl.arange(0, 2 * HALF)
        inside = ok[:, None] & (pair < ROTARY)[None, :]
        both = tl.load(at[:, None] + pair[None, :], mask=inside, other=0.0)
        a, b = tl.split(tl.reshape(both, [at.shape[0], HALF, 2]))
    else:
        item = tl.arange(0, HALF)
        inside = ok[:, None] & (item < ROTARY // 2)[None, :]
        own = at[:, None] + item[None, :]
        a = tl.load(own, mask=inside, other=0.0)
        b = tl.load(own + ROTARY // 2, mask=inside, other=0.0)
    return a, b


@triton.jit
def _load_rest(at, ok, DIM: tl.constexpr, ROTARY: tl.constexpr, REST: tl.constexpr):
    column = ROTARY + tl.arange(0, REST)
    inside = ok[:, None] & (column < DIM)[None, :]
    return tl.load(at[:, None] + column[None, :], mask=inside, other=0.0)


@triton.jit
def _store(at, a, b, rest, ok, DIM: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr,
           REST: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """The parts of rows back to their columns."""
    if INTERLEAVED:
        pair = tl.arange(0, 2 * HALF)
        inside = ok[:, None] & (pair < ROTARY)[None, :]
        both = tl.reshape(tl.join(a, b), [at.shape[0], 2 * HALF])
        tl.store(at[:, None] + pair[None, :], both, mask=inside)
    else:
        item = tl.arange(0, HALF)
        inside = ok[:, None] & (item < ROTARY // 2)[None, :]
        own = at[:, None] + item[None, :]
        tl.store(own, a, mask=inside)
        tl.store(own + ROTARY // 2, b, mask=inside)
    if REST:
        column = ROTARY + tl.arange(0, REST)
        inside = ok[:, None] & (column < DIM)[None, :]
        tl.store(at[:, None] + column[None, :], rest, mask=inside)


@triton.jit
def _part_signs(any, DIM: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr,
                REST: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr,
                QUANTIZE: tl.constexpr):  # fmt: skip
    """The signs of both halves, one after the other, and of the rest. `any` is a pointer that is
    not read."""
    kind: tl.constexpr = tl.bfloat16 if any.dtype.element_ty == tl.float32 else any.dtype.element_ty
    if QUANTIZE:
        pair, side = tl.arange(0, 2 * HALF) % HALF, tl.arange(0, 2 * HALF) // HALF
        column = 2 * pair + side if INTERLEAVED else pair + side * (ROTARY // 2)
        sign = signs(any, tl.where(pair < ROTARY // 2, column, DIM), WIDTH, DIM, kind)
        rest = signs(any, ROTARY + tl.arange(0, REST), WIDTH, DIM, kind) if REST else sign
    else:
        sign, rest = 0, 0
    return sign, rest


@triton.jit
def _transformed(a, b, rest, sign, rest_sign, REST: tl.constexpr):
    """The Hadamard transform of rows in parts, not yet scaled, in fp32."""
    SPLIT: tl.constexpr = a.dtype == tl.float32
    both = tl.reshape(tl.trans(tl.join(a, b), 0, 2, 1), [a.shape[0], 2 * a.shape[1]])
    acc = tl.zeros([a.shape[0], sign.shape[1]], tl.float32)
    acc = signed_sum(both, sign, acc, SPLIT)
    if REST:
        acc = signed_sum(rest, rest_sign, acc, SPLIT)
    return acc


@triton.jit
def _parameters(at, columns, DIM: tl.constexpr):
    return tl.load(at + columns, mask=columns < DIM, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _layer_norm(a, b, rest, weight, bias, first, second, eps, dtype: tl.constexpr,
                DIM: tl.constexpr, ROTARY: tl.constexpr, REST: tl.constexpr):  # fmt: skip
    """The layer norm of rows in parts, rounded to `dtype`; fp32. Columns of no key are 0 before
    and garbage-free after, as their weight and bias are 0."""
    third = ROTARY + tl.arange(0, REST if REST else 1)
    total = tl.sum(a, 1) + tl.sum(b, 1)
    if REST:
        total += tl.sum(rest, 1)
    mean = (total / DIM)[:, None]
    a = tl.where((first < DIM)[None, :], a - mean, 0.0)
    b = tl.where((second < DIM)[None, :], b - mean, 0.0)
    squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
    if REST:
        rest = tl.where((third < DIM)[None, :], rest - mean, 0.0)
        squares += tl.sum(rest * rest, 1)
    factor = tl.rsqrt(squares / DIM + eps)[:, None]
    a = a * factor * _parameters(weight, first, DIM) + _parameters(bias, first, DIM)
    b = b * factor * _parameters(weight, second, DIM) + _parameters(bias, second, DIM)
    if REST:
        rest = rest * factor * _parameters(weight, third, DIM) + _parameters(bias, third, DIM)
    return a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32), rest.to(dtype)


@triton.jit
def _keys(
    first_token, k, k_weight, k_bias, positions, cos_sin, k_out, tokens, positions_end, stride,
    table_stride, eps, factor, DIM: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    """Some tokens' keys."""
    kind: tl.constexpr = k.dtype.element_ty
    sign, rest_sign = _part_signs(k, DIM, ROTARY, HALF, REST, WIDTH, INTERLEAVED, QUANTIZE)
    first, second = _columns(DIM, ROTARY, HALF, INTERLEAVED)
    token = first_token + tl.arange(0, KEYS)
    ok = token < tokens
    source = k + token.to(tl.int64) * stride
    position = positions_of(positions, token, ok, positions_end)
    a, b = _load(source, ok, ROTARY, HALF, INTERLEAVED)
    rest = _load_rest(source, ok, DIM, ROTARY, REST) if REST else a
    cos, sin = table_of(cos_sin, position, ok, table_stride, ROTARY, HALF)
    a, b, rest = _layer_norm(
        a.to(tl.float32), b.to(tl.float32), rest.to(tl.float32), k_weight, k_bias, first, second,
        eps, kind, DIM, ROTARY, REST,
    )  # fmt: skip
    a, b = turned(a, b, cos, sin)
    a, b, target = a.to(kind), b.to(kind), k_out + token.to(tl.int64) * DIM
    if QUANTIZE:
        made = _transformed(a, b, rest, sign, rest_sign, REST)
        column = tl.arange(0, WIDTH)[None, :]
        tl.store(
            target[:, None] + column, (made * factor).to(kind), mask=ok[:, None] & (column < DIM)
        )
    else:
        _store(target, a, b, rest, ok, DIM, ROTARY, HALF, REST, INTERLEAVED)


@triton.jit
def _queries(
    program, q, weights, positions, cos_sin, q_out, w_out, tokens, heads, parts, positions_end,
    stride, weight_stride, table_stride, weight_factor, factor, DIM: tl.constexpr,
    ROTARY: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr, QUANTIZE: tl.constexpr, POW2: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """TILES tiles, each of some heads of one token, and their weights."""
    kind: tl.constexpr = q.dtype.element_ty
    sign, rest_sign = _part_signs(q, DIM, ROTARY, HALF, REST, WIDTH, INTERLEAVED, QUANTIZE)
    for at in range(0, TILES):
        tile = program * TILES + at
        token, head = tile // parts, tile % parts * ROWS + tl.arange(0, ROWS)
        real = token < tokens
        ok = (head < heads) & real
        source = q + token.to(tl.int64) * stride + head * DIM
        only = tl.full([1], True, tl.int1) & real  # one row of the table serves a token's heads
        position = positions_of(positions, tl.arange(0, 1) + token, only, positions_end)
        a, b = _load(source, ok, ROTARY, HALF, INTERLEAVED)
        rest = _load_rest(source, ok, DIM, ROTARY, REST) if REST else a
        weight_at = weights + token.to(tl.int64) * weight_stride + head
        weight = tl.load(weight_at, mask=ok, other=0.0) * weight_factor
        cos, sin = table_of(cos_sin, position, only, table_stride, ROTARY, HALF)
        a, b = turned(a.to(tl.float32), b.to(tl.float32), cos, sin)
        row = token.to(tl.int64) * heads + head
        a, b, target = a.to(kind), b.to(kind), q_out + row * DIM
        if QUANTIZE:
            made = _transformed(a, b, rest, sign, rest_sign, REST)
            scale = scale_of(tl.max(tl.abs(made), 1) * factor, POW2)
            weight *= scale
            code = encoded(made, scale[:, None], POW2, factor)
            column = tl.arange(0, WIDTH)[None, :]
            tl.store(target[:, None] + column, code, mask=ok[:, None] & (column < DIM))
        else:
            _store(target, a, b, rest, ok, DIM, ROTARY, HALF, REST, INTERLEAVED)
        tl.store(w_out + row, weight, mask=ok)


@triton.jit(do_not_specialize=["key_programs", "tokens", "positions_end"])
def _indexer(
    q, k, weights, k_weight, k_bias, positions, cos_sin, q_out, k_out, w_out, key_programs, tokens,
    heads, parts, positions_end, q_stride, k_stride, weight_stride, table_stride, eps,
    weight_factor, factor, DIM: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, QUANTIZE: tl.constexpr,
    POW2: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, WITH_KEYS: tl.constexpr,
    WITH_QUERIES: tl.constexpr,
):  # fmt: skip
    """The first programs take keys, the others queries, if there are any of either."""
    pid = tl.program_id(0)
    if WITH_KEYS and pid < key_programs:
        _keys(
            pid * KEYS, k, k_weight, k_bias, positions, cos_sin, k_out, tokens, positions_end,
            k_stride, table_stride, eps, factor, DIM, ROTARY, HALF, REST, WIDTH, INTERLEAVED,
            QUANTIZE,
        )  # fmt: skip
    if WITH_QUERIES and pid >= key_programs:
        _queries(
            pid - key_programs, q, weights, positions, cos_sin, q_out, w_out, tokens, heads, parts,
            positions_end, q_stride, weight_stride, table_stride, weight_factor, factor, DIM,
            ROTARY, HALF, REST, WIDTH, INTERLEAVED, QUANTIZE, POW2, ROWS, TILES,
        )  # fmt: skip
