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
"""Programs of queries from which keys have a launch of their own: in one program with the queries,
their steps would cost the queries half of the programs that run at once, for want of registers."""


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
    rest = dim - rotary
    tile = pick("indexer_qk", rows, power_of_two(dim))
    parts = triton.cdiv(heads, tile.rows)
    keys, queries = triton.cdiv(tokens, KEYS.value), tokens * parts
    together = queries < MANY
    for with_keys, with_queries in [(True, True)] if together else [(True, False), (False, True)]:
        _indexer[(keys * with_keys + queries * with_queries,)](
            q, k, weights, dense(k_weight), dense(k_bias), dense(positions), cos_sin, q_out, k_out,
            w_out, keys * with_keys, tokens, heads, parts, cos_sin.shape[0], q.stride(0),
            k.stride(0), weights.stride(0), cos_sin.stride(0), eps, (heads * dim) ** -0.5,
            dim**-0.5, DIM=dim, ROTARY=rotary, HALF=max(LEAST.value, power_of_two(rotary // 2)),
            REST=max(LEAST.value, power_of_two(rest)) if rest else 0,
            WIDTH=max(LEAST.value, power_of_two(dim)), INTERLEAVED=interleaved, QUANTIZE=quantize,
            POW2=pow2, ROWS=tile.rows, WITH_KEYS=with_keys, WITH_QUERIES=with_queries,
            num_warps=tile.warps,
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
    """Both halves of the rows that start at `at`, in fp32."""
    if INTERLEAVED:
        pair = tl.arange(0, 2 * HALF)
        inside = ok[:, None] & (pair < ROTARY)[None, :]
        both = tl.load(at[:, None] + pair[None, :], mask=inside, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, [at.shape[0], HALF, 2]))
    else:
        item = tl.arange(0, HALF)
        inside = ok[:, None] & (item < ROTARY // 2)[None, :]
        own = at[:, None] + item[None, :]
        a = tl.load(own, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(own + ROTARY // 2, mask=inside, other=0.0).to(tl.float32)
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
def _transformed(any, a, b, rest, first, second, DIM: tl.constexpr, ROTARY: tl.constexpr,
                 REST: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """The Hadamard transform of rows in parts, not yet scaled, as fp32 [rows, WIDTH]. `any` is a
    pointer that is not read."""
    SPLIT: tl.constexpr = a.dtype == tl.float32
    kind: tl.constexpr = tl.bfloat16 if SPLIT else a.dtype
    # All signs before the first product, whose sums hold many registers.
    a_sign = signs(any, first, WIDTH, DIM, kind)
    b_sign = signs(any, second, WIDTH, DIM, kind)
    if REST:
        rest_sign = signs(any, ROTARY + tl.arange(0, REST), WIDTH, DIM, kind)
    acc = signed_sum(a, a_sign, tl.zeros([a.shape[0], WIDTH], tl.float32), SPLIT)
    acc = signed_sum(b, b_sign, acc, SPLIT)
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
    first, second = _columns(DIM, ROTARY, HALF, INTERLEAVED)
    token = first_token + tl.arange(0, KEYS)
    ok = token < tokens
    source = k + token.to(tl.int64) * stride
    a, b = _load(source, ok, ROTARY, HALF, INTERLEAVED)
    rest = _load_rest(source, ok, DIM, ROTARY, REST).to(tl.float32) if REST else a
    position = positions_of(positions, token, ok, positions_end)
    cos, sin = table_of(cos_sin, position, ok, table_stride, ROTARY, HALF)
    a, b, rest = _layer_norm(
        a, b, rest, k_weight, k_bias, first, second, eps, kind, DIM, ROTARY, REST
    )
    a, b = turned(a, b, cos, sin)
    a, b, target = a.to(kind), b.to(kind), k_out + token.to(tl.int64) * DIM
    if QUANTIZE:
        made = _transformed(k, a, b, rest, first, second, DIM, ROTARY, REST, WIDTH) * factor
        column = tl.arange(0, WIDTH)[None, :]
        tl.store(target[:, None] + column, made.to(kind), mask=ok[:, None] & (column < DIM))
    else:
        _store(target, a, b, rest, ok, DIM, ROTARY, HALF, REST, INTERLEAVED)


@triton.jit
def _queries(
    token, head, q, weights, positions, cos_sin, q_out, w_out, heads, positions_end, stride,
    weight_stride, table_stride, weight_factor, factor, DIM: tl.constexpr, ROTARY: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr,
    QUANTIZE: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """Some heads of one token, and their weights."""
    kind: tl.constexpr = q.dtype.element_ty
    first, second = _columns(DIM, ROTARY, HALF, INTERLEAVED)
    ok = head < heads
    source = q + token.to(tl.int64) * stride + head * DIM
    a, b = _load(source, ok, ROTARY, HALF, INTERLEAVED)
    rest = _load_rest(source, ok, DIM, ROTARY, REST) if REST else a
    weight = tl.load(weights + token.to(tl.int64) * weight_stride + head, mask=ok, other=0.0)
    weight *= weight_factor
    only = tl.full([1], True, tl.int1)  # one row of the table serves all heads of a token
    position = positions_of(positions, tl.arange(0, 1) + token, only, positions_end)
    cos, sin = table_of(cos_sin, position, only, table_stride, ROTARY, HALF)
    a, b = turned(a, b, cos, sin)
    row = token.to(tl.int64) * heads + head
    a, b, target = a.to(kind), b.to(kind), q_out + row * DIM
    if QUANTIZE:
        made = _transformed(q, a, b, rest, first, second, DIM, ROTARY, REST, WIDTH)
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
    POW2: tl.constexpr, ROWS: tl.constexpr, WITH_KEYS: tl.constexpr, WITH_QUERIES: tl.constexpr,
):  # fmt: skip
    """The first programs take keys, the others queries, if there are any of either."""
    pid = tl.program_id(0)
    if WITH_KEYS and pid < key_programs:
        _keys(
            pid * KEYS, k, k_weight, k_bias, positions, cos_sin, k_out, tokens, positions_end,
            k_stride, table_stride, eps, factor, DIM, ROTARY, HALF, REST, WIDTH, INTERLEAVED,
            QUANTIZE,
        )  # fmt: skip
    if WITH_QUERIES:
        tile = pid - key_programs
        if tile >= 0:
            head = tile % parts * ROWS + tl.arange(0, ROWS)
            _queries(
                tile // parts, head, q, weights, positions, cos_sin, q_out, w_out, heads,
                positions_end, q_stride, weight_stride, table_stride, weight_factor, factor, DIM,
                ROTARY, HALF, REST, WIDTH, INTERLEAVED, QUANTIZE, POW2,
            )  # fmt: skip
