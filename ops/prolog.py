"""What stands before attention as one op: from hidden states to absorbed queries, with the latents
written to the cache. The model here takes steps instead, whose first product is the indexer's too;
this is for engines that want one launch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsa_hal.case import Cost, Inputs, Maker, case
from dsa_hal.check import Finding, Report, bitwise, calc_diff, count, each, form
from dsa_hal.ops._contract import floats, shaped, typed
from dsa_hal.ops.cache import store_latent
from dsa_hal.ops.fused import latent_qkv
from dsa_hal.ops.layout import KVLayout, misfit
from dsa_hal.ops.norm import make_cos_sin, rope, rope_wrong
from dsa_hal.registry import Call, composite

ROUNDED = 5e-5
"""calc_diff of results behind three products in bf16, with a rotary table in bf16 or fp32."""

# -- pack_prolog --------------------------------------------------------------------------------


def _weights(
    make: Maker, hidden: int, q_lora: int, heads: int, nope: int, rope_dim: int, lora: int,
    dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    shapes = (
        (hidden, q_lora), (q_lora, heads * (nope + rope_dim)), (heads, nope, lora),
        (hidden, lora + rope_dim),
    )  # fmt: skip
    return [make.randn(*shape, dtype=dtype, scale=shape[-2] ** -0.5) for shape in shapes]


def _pack_inputs(
    make: Maker, *, hidden: int, q_lora: int, heads: int, nope: int, rope_dim: int, lora: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Inputs:  # fmt: skip
    return dict(weights=_weights(make, hidden, q_lora, heads, nope, rope_dim, lora, dtype))


def _pack_cost(weights: list[Tensor]) -> Cost:
    return Cost(0.0, 2.0 * sum(w.numel() * w.element_size() for w in weights))


def _pack_invalid(weights: list[Tensor]) -> str | None:
    if len(weights) < 4:
        return f"weights are {len(weights)} tensors; expected q_a, q_b, k_b and kv_a"
    q_a, q_b, k_b, kv_a = weights[:4]
    return (
        floats(q_a=q_a)
        or typed(q_a.dtype, q_b=q_b, k_b=k_b, kv_a=kv_a)
        or shaped("weights[0]", q_a, "hidden", "q_lora")
        or shaped("weights[1]", q_b, q_a.shape[1], "heads * (nope + rope_dim)")
        or shaped("weights[2]", k_b, "heads", "nope", "lora")
        or shaped("weights[3]", kv_a, q_a.shape[0], "lora + rope_dim")
    )


def _same(got: Sequence[Tensor], want: Sequence[Tensor], inputs: Inputs) -> Report:
    names = ("q_a", "q_b", "k_b", "kv_a")
    return each(**{name: bitwise for name in names})(got[: len(names)], want, inputs)


_SMALL: dict[str, Any] = dict(hidden=72, q_lora=48, heads=3, nope=24, rope_dim=16, lora=40)
_NARROW: dict[str, Any] = dict(hidden=6144, q_lora=1536, heads=1, nope=128, rope_dim=64, lora=512)
_MODEL: dict[str, Any] = dict(hidden=7168, q_lora=1536, heads=128, nope=128, rope_dim=64, lora=512)


@composite(
    uses=(),
    version=1,
    constant=("hidden", "q_lora", "heads", "nope", "rope_dim", "lora", "dtype"),
    variable={},
    inputs=_pack_inputs,
    cases=(
        case("small", dtype=torch.float32, **_SMALL),
        case("bf16", **_SMALL),
        case("layer", model=True, **_MODEL),
    ),
    check=_same,
    cost=_pack_cost,
    invalid=_pack_invalid,
)
def pack_prolog(weights: list[Tensor]) -> list[Tensor]:
    """The weights of `mla_prolog` as this backend's wants them in memory; done once, at load.

    weights  q_a [hidden, q_lora], q_b [q_lora, heads * (nope + rope_dim)], k_b [heads, nope, lora],
             kv_a [hidden, lora + rope_dim]; bf16, fp16 or fp32. Matrices that multiply from the
             right: the transposes of a checkpoint's, and kv_b's rows for keys
    -> out   the four with the same shapes, dtypes and values, here the same tensors. A backend may
             return copies whose order in memory is its own, and more tensors after these, by which
             it knows them again

    Source: torch_npu's matrices in its format FRACTAL_NZ (`npu_format_cast`).
    """
    return list(weights)


# -- mla_prolog ---------------------------------------------------------------------------------


def _inputs(
    make: Maker, *, tokens: int, hidden: int, q_lora: int, heads: int, nope: int, rope_dim: int,
    lora: int, layout: str = "latent_bf16", page_size: int = 64, pages: int = 3,
    dtype: torch.dtype = torch.bfloat16,
) -> Inputs:  # fmt: skip
    cache = KVLayout.parse(f"{layout}/{lora}+{rope_dim}")
    pool = cache.empty(pages, page_size, make.device)
    held = make.randn(pages, page_size, cache.width)
    for name, part in cache.encode(held).items():
        cache.views(pool)[name].copy_(part)
    return dict(
        x=make.randn(tokens, hidden, dtype=dtype),
        weights=_weights(make, hidden, q_lora, heads, nope, rope_dim, lora, dtype),
        q_norm=make.randn(q_lora), kv_norm=make.randn(lora),
        positions=make.randint(0, 97, tokens), cos_sin=make_cos_sin(make, 97, rope_dim),
        pages=pool, slots=make.permutation(pages * page_size)[:tokens], layout=cache.spec,
    )  # fmt: skip


def _cost(
    x: Tensor, weights: list[Tensor], q_norm: Tensor, kv_norm: Tensor, positions: Tensor,
    cos_sin: Tensor, pages: Tensor, slots: Tensor, *, layout: str, eps: float = 1e-6,
) -> Cost:  # fmt: skip
    numbers = sum(weight.numel() for weight in weights[:4])
    q_lora, (heads, _, lora) = weights[0].shape[1], weights[2].shape
    row = x.shape[1] + q_lora + heads * (lora + cos_sin.shape[1])
    moved = (numbers + x.shape[0] * row) * x.element_size()
    written = x.shape[0] * KVLayout.parse(layout).token_bytes
    return Cost(2.0 * x.shape[0] * numbers, moved + written)


def _invalid(
    x: Tensor, weights: list[Tensor], q_norm: Tensor, kv_norm: Tensor, positions: Tensor,
    cos_sin: Tensor, pages: Tensor, slots: Tensor, *, layout: str, eps: float = 1e-6,
) -> str | None:  # fmt: skip
    if wrong := misfit(pages, layout, "latent") or _pack_invalid(weights):
        return wrong
    q_a, q_b, k_b, kv_a = weights[:4]
    if wrong := shaped("x", x, "tokens", q_a.shape[0]) or typed(q_a.dtype, x=x):
        return wrong
    tokens, (heads, nope, lora) = x.shape[0], k_b.shape
    if wrong := rope_wrong(positions, cos_sin, tokens, kv_a.shape[1]):
        return wrong
    rope_dim = cos_sin.shape[1]
    return (
        shaped("weights[1]", q_b, q_a.shape[1], heads * (nope + rope_dim))
        or shaped("weights[3]", kv_a, q_a.shape[0], lora + rope_dim)
        or latent_qkv.invalid(
            x.new_empty(tokens, q_a.shape[1]), x.new_empty(tokens, kv_a.shape[1]),
            q_norm, kv_norm, positions, cos_sin,
        )
        or store_latent.invalid(pages, x.new_empty(tokens, lora + rope_dim), slots, layout=layout)
    )  # fmt: skip


def _asks(
    x: Tensor, weights: list[Tensor], q_norm: Tensor, kv_norm: Tensor, positions: Tensor,
    cos_sin: Tensor, pages: Tensor, slots: Tensor, *, layout: str, eps: float = 1e-6,
) -> Sequence[Call]:  # fmt: skip
    """The store, which some backends have not for every layout."""
    shape = x.shape[0], KVLayout.parse(layout).width
    latent = torch.empty(shape, dtype=x.dtype, device="meta")
    return [(store_latent, (pages, latent, slots), dict(layout=layout))]


def _unread(
    x: Tensor, weights: list[Tensor], q_norm: Tensor, kv_norm: Tensor, positions: Tensor,
    cos_sin: Tensor, pages: Tensor, slots: Tensor, *, layout: str, eps: float = 1e-6,
) -> dict[str, Tensor]:  # fmt: skip
    named = torch.zeros(cos_sin.shape[0], dtype=torch.bool, device=x.device)
    named[positions.long()] = True
    return {"cos_sin": ~named[:, None].expand(cos_sin.shape)}


def _judge(got: Sequence[Tensor], want: Sequence[Tensor], inputs: Inputs) -> Report:
    """The three results, what stands in the written slots, and that nothing else changed."""
    if wrong := count(got, want) or form("pages", got[3], want[3]):
        return Report(tuple(wrong))
    near = calc_diff(ROUNDED)
    report = each(query=near, query_rope=near, qr=near)(got[:3], want[:3], inputs)
    layout, slots = KVLayout.parse(inputs["layout"]), inputs["slots"].long()
    written = torch.zeros(inputs["pages"].shape[:2], dtype=torch.bool, device=slots.device)
    written.view(-1)[slots] = True
    mask = layout.mask(want[3], written)
    changed = float((got[3].view(torch.uint8) != want[3].view(torch.uint8)).view(
        *mask.shape, -1).any(-1)[~mask].sum())  # fmt: skip
    latents = [
        layout.decode({n: part[written] for n, part in layout.views(pool).items()})
        for pool in (got[3], want[3])
    ]
    return Report((
        *report.findings,
        *near("latents", *latents),
        Finding("pages", "elements changed outside the slots", changed, 0.0, changed == 0),
    ))  # fmt: skip


@composite(
    uses=(latent_qkv, rope, store_latent),
    version=1,
    constant=("hidden", "q_lora", "heads", "nope", "rope_dim", "lora", "layout", "page_size",
              "dtype"),
    variable={"tokens": "x[0]", "pages": "pages[0]"},
    inputs=_inputs,
    cases=(
        case("empty", tokens=0, dtype=torch.float32, layout="latent_fp32", **_SMALL),
        case("small", tokens=19, dtype=torch.float32, layout="latent_fp32", page_size=16, **_SMALL),
        case("bf16", tokens=5, page_size=3, **_SMALL),
        case("split", tokens=2, page_size=128, layout="latent_bf16_split", traps=(1, 10),
             **_NARROW),
        *(
            case(f"decode_m{tokens}", model=True, tokens=tokens, page_size=128,
                 layout="latent_bf16_split", **_MODEL)
            for tokens in (1, 64)
        ),
    ),
    check=_judge,
    cost=_cost,
    outputs=("query", "query_rope", "qr"),
    mutates=("pages",),
    invalid=_invalid,
    asks=_asks,
    unread=_unread,
)  # fmt: skip
def mla_prolog(
    x: Tensor, weights: list[Tensor], q_norm: Tensor, kv_norm: Tensor, positions: Tensor,
    cos_sin: Tensor, pages: Tensor, slots: Tensor, *, layout: str, eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """From hidden states to what attention over pages takes; the latents go to the cache.

    x           [tokens, hidden] bf16, fp16 or fp32, after the block's norm
    weights     what `pack_prolog` of this backend returned, or its four; x's dtype
    q_norm      [q_lora], kv_norm [lora]: RMS norms with eps, fp32 or x's dtype
    positions   [tokens] int32 or int64
    cos_sin     [max_position, rope_dim] fp32, as in `rope`; pairs are neighbouring columns
    pages       [pages, page_size, record] pool in `layout`; only the named slots change
    slots       [tokens] int32, distinct, one for every token: here -1 is an error
    -> query       [tokens, heads, lora] x's dtype: absorbed, as attention over latents takes it
    -> query_rope  [tokens, heads, rope_dim] x's dtype, rotated
    -> qr          [tokens, q_lora] x's dtype: the compressed query, for the indexer

    Rotated parts, the queries' and the cached, come out as halves: the first elements of all pairs,
    then the second ones. That is another order than `rope` and `latent_qkv` leave. Products of
    query and key are the same in either, but a pool that was written in one must not be read with
    queries in the other.

    Source: torch_npu's `npu_mla_prolog_v3`.
    """
    q_a, q_b, k_b, kv_a = weights[:4]
    heads, nope, lora = k_b.shape
    qr, latent = latent_qkv(x @ q_a, x @ kv_a, q_norm, kv_norm, positions, cos_sin, eps=eps)
    q = (qr @ q_b).view(x.shape[0], heads, nope + cos_sin.shape[1])
    q = rope(q, positions, cos_sin, interleaved=True, offset=nope)
    cached = torch.cat([latent[:, :lora], _halves(latent[:, lora:])], -1)
    store_latent(pages, cached, slots, layout=layout)
    query = torch.bmm(q[..., :nope].transpose(0, 1), k_b).transpose(0, 1)
    return query.contiguous(), _halves(q[..., nope:]), qr


def _halves(x: Tensor) -> Tensor:
    """Neighbouring columns as columns half an axis apart."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], -1)
