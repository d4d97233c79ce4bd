"""Mixture of experts: tokens to their experts' rows and back, and the whole layer.

Source: `MoE` of the model's demo code; DeepGEMM's contiguous layout for the rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsa_hal.case import Cost, Inputs, Maker, case
from dsa_hal.check import Check, Report, bitwise, close, each
from dsa_hal.ops._contract import floats, shaped, typed
from dsa_hal.ops.norm import silu_mul
from dsa_hal.ops.packed import act_wrong, by_act, grouped_linear, make_packed, numbers, packed_wrong
from dsa_hal.ops.quant import blocks
from dsa_hal.registry import composite, op

# -- permute ------------------------------------------------------------------------------------


def make_ids(make: Maker, tokens: int, topk: int, experts: int, absent: float) -> Tensor:
    """Expert ids [tokens, topk] int32 without repeats in a row; a share `absent` of them -1."""
    rows = [make.pick.sample(range(experts), topk) for _ in range(tokens)]
    here = [[i if make.pick.random() >= absent else -1 for i in row] for row in rows]
    return make.tensor(here).reshape(tokens, topk)


def permuted_rows(slots: int, experts: int, align: int) -> int:
    """How many rows `permute` makes: enough for any routing of tokens * topk = `slots`."""
    return blocks(slots + experts * (align - 1), align) * align


def _permute_inputs(
    make: Maker, *, tokens: int, topk: int, experts: int, dim: int, align: int, absent: float,
    dtype: torch.dtype,
) -> Inputs:  # fmt: skip
    return dict(
        x=make.randn(tokens, dim, dtype=dtype),
        ids=make_ids(make, tokens, topk, experts, absent),
        experts=experts,
        align=align,
    )


def _permute_cost(x: Tensor, ids: Tensor, *, experts: int, align: int = 1) -> Cost:
    rows = permuted_rows(ids.numel(), experts, align)
    return Cost(0.0, (x.numel() + rows * x.shape[1]) * x.element_size() + 4 * rows)


def _permute_invalid(x: Tensor, ids: Tensor, *, experts: int, align: int = 1) -> str | None:
    if experts < 1 or align < 1:
        return f"experts is {experts} and align {align}; expected at least 1 of both"
    if wrong := shaped("x", x, "tokens", "dim") or typed(torch.int32, ids=ids):
        return wrong
    return shaped("ids", ids, x.shape[0], "topk")


def _permute_unread(x: Tensor, ids: Tensor, *, experts: int, align: int = 1) -> dict[str, Tensor]:
    return {"x": (ids < 0).all(1)[:, None].expand(x.shape)}


@op(
    version=1,
    constant=("topk", "experts", "dim", "align", "absent", "dtype"),
    variable={"tokens": "x[0]"},
    inputs=_permute_inputs,
    cases=(
        *(
            case(name, tokens=tokens, topk=topk, experts=experts, dim=dim, align=align,
                 absent=absent, dtype=dtype)
            for name, tokens, topk, experts, dim, align, absent, dtype in (
                ("empty", 0, 4, 8, 64, 1, 0.0, torch.bfloat16),
                ("empty_aligned", 0, 4, 3, 64, 16, 0.0, torch.bfloat16),
                ("one", 1, 4, 16, 33, 1, 0.0, torch.bfloat16),
                ("odd", 63, 3, 7, 40, 1, 0.0, torch.float32),
                ("aligned", 65, 4, 9, 64, 16, 0.0, torch.bfloat16),
                ("some_absent", 65, 4, 9, 64, 8, 0.6, torch.bfloat16),
                ("all_absent", 5, 2, 4, 64, 4, 1.0, torch.bfloat16),
                ("few_hit", 3, 2, 64, 32, 128, 0.0, torch.float32),
            )
        ),
        *(
            case(f"model_m{tokens}", model=True, tokens=tokens, topk=8, experts=256, dim=7168,
                 align=align, absent=0.0, dtype=torch.bfloat16)
            for tokens, align in ((1, 1), (128, 16), (4096, 128))
        ),
    ),
    check=each(rows=bitwise, grouped_layout=bitwise, position=bitwise),
    cost=_permute_cost,
    outputs=("rows", "grouped_layout", "position"),
    invalid=_permute_invalid,
    unread=_permute_unread,
)  # fmt: skip
def permute(
    x: Tensor, ids: Tensor, *, experts: int, align: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Copy each token once per chosen expert, rows of one expert together.

    x                  [tokens, dim], any dtype
    ids                [tokens, topk] int32 in [0, experts); -1 = not on this rank: no row is made
    align              each expert's rows start at a multiple of it, and are padded up to one
    -> rows            [n, dim] x's dtype; experts ascending, then tokens; padding rows zero.
                       n = tokens * topk + experts * (align - 1), up to a multiple of align: room
                       for any routing, so that no shape depends on data
    -> grouped_layout  [n] int32: the row's expert, -1 for padding
    -> position        [tokens, topk] int32: where the token's row is, -1 for ids of -1

    Source: DeepGEMM's contiguous grouped layout, with a bound in place of a count of rows.
    """
    flat = ids.flatten().long()
    rows = permuted_rows(flat.numel(), experts, align)
    key = torch.where(flat < 0, experts, flat)  # absent ones last
    order = key.sort(stable=True).indices
    count = torch.zeros(experts + 1, dtype=torch.long, device=x.device)
    count = count.scatter_add(0, key, torch.ones_like(key))
    room = (count + align - 1) // align * align
    start, first = room.cumsum(0) - room, count.cumsum(0) - count
    ordered = key[order]
    place = start[ordered] + torch.arange(flat.numel(), device=x.device) - first[ordered]
    place = torch.where(ordered == experts, rows, place)  # one more row takes what is absent
    position = torch.zeros_like(flat).scatter(0, order, torch.where(place == rows, -1, place))
    source = x[order // max(ids.shape[1], 1)]
    made = x.new_zeros((rows + 1, x.shape[1])).index_copy(0, place, source)[:rows]
    layout = torch.full((rows + 1,), -1, dtype=torch.long, device=x.device)
    layout = layout.scatter(0, place, ordered)[:rows]
    return made.contiguous(), layout.int(), position.int().view(ids.shape)


# -- unpermute ----------------------------------------------------------------------------------


def _unpermute_inputs(
    make: Maker, *, tokens: int, topk: int, dim: int, spare: int, absent: float, shared: bool,
    dtype: torch.dtype,
) -> Inputs:  # fmt: skip
    rows = tokens * topk + spare
    here = make.tensor(
        [-1 if make.pick.random() < absent else 1 for _ in range(tokens * topk)]
    ).reshape(tokens, topk)
    places = make.permutation(rows)[: tokens * topk].reshape(tokens, topk)
    return dict(
        rows=make.randn(rows, dim, dtype=dtype),
        position=torch.where(here < 0, here, places),
        weights=make.randn(tokens, topk),
        shared=make.randn(tokens, dim, dtype=dtype, scale=2.0) if shared else None,
    )


def _unpermute_cost(
    rows: Tensor, position: Tensor, weights: Tensor, shared: Tensor | None = None
) -> Cost:
    moved = (position.numel() + (1 if shared is None else 2) * position.shape[0]) * rows.shape[1]
    return Cost(2.0 * position.numel() * rows.shape[1], moved * rows.element_size())


def _unpermute_invalid(
    rows: Tensor, position: Tensor, weights: Tensor, shared: Tensor | None = None
) -> str | None:
    if wrong := shaped("rows", rows, "n", "dim") or shaped("position", position, "tokens", "topk"):
        return wrong
    if shared is not None and (
        wrong := shaped("shared", shared, position.shape[0], rows.shape[1])
        or typed(rows.dtype, shared=shared)
    ):
        return wrong
    return (
        floats(rows=rows)
        or typed(torch.int32, position=position)
        or typed(torch.float32, weights=weights)
        or shaped("weights", weights, *position.shape)
    )


def _unpermute_unread(
    rows: Tensor, position: Tensor, weights: Tensor, shared: Tensor | None = None
) -> dict[str, Tensor]:
    used = torch.zeros(rows.shape[0] + 1, dtype=torch.bool, device=rows.device)
    used[position.flatten().long()] = True  # -1 marks the extra last one
    return {"rows": ~used[:-1, None].expand(rows.shape), "weights": position < 0}


def one_rounding(*, abs: float) -> Check:
    """Outputs named "out" that differ by at most one rounding to their dtype."""

    def check(got: Sequence[Tensor], want: Sequence[Tensor], inputs: Inputs) -> Report:
        rel = {torch.float32: 1e-5, torch.float16: 2.01 / 2048}.get(want[0].dtype, 2.01 / 256)
        return each(out=close(abs=abs, rel=rel))(got, want, inputs)

    return check


@op(
    version=1,
    constant=("topk", "dim", "spare", "absent", "shared", "dtype"),
    variable={"tokens": "position[0]"},
    inputs=_unpermute_inputs,
    cases=(
        *(
            case(name, tokens=tokens, topk=topk, dim=dim, spare=spare, absent=absent, shared=shared,
                 dtype=dtype)
            for name, tokens, topk, dim, spare, absent, shared, dtype in (
                ("empty", 0, 4, 64, 0, 0.0, False, torch.bfloat16),
                ("one", 1, 4, 33, 0, 0.0, True, torch.bfloat16),
                ("odd", 63, 3, 40, 9, 0.0, True, torch.float32),
                ("absent", 65, 4, 64, 30, 0.6, False, torch.bfloat16),
                ("all_absent", 5, 2, 64, 3, 1.0, True, torch.bfloat16),
                ("half", 9, 2, 16, 0, 0.3, True, torch.float16),
            )
        ),
        *(
            case(f"model_m{tokens}", model=True, tokens=tokens, topk=8, dim=7168, spare=0,
                 absent=0.0, shared=True, dtype=torch.bfloat16)
            for tokens in (1, 128, 4096)
        ),
    ),
    check=one_rounding(abs=1e-5),
    cost=_unpermute_cost,
    invalid=_unpermute_invalid,
    unread=_unpermute_unread,
)  # fmt: skip
def unpermute(
    rows: Tensor, position: Tensor, weights: Tensor, shared: Tensor | None = None
) -> Tensor:
    """Weighted sum of each token's rows, plus the shared expert: `permute` undone.

    rows      [n, dim] bf16, fp16 or fp32
    position  [tokens, topk] int32 rows of `rows`; -1 = no row, adds nothing whatever its weight
    weights   [tokens, topk] fp32
    shared    [tokens, dim] rows' dtype, added with weight 1, or None
    -> out    [tokens, dim] rows' dtype; summed in fp32 and rounded once

    Source: the accumulation in `MoE` of the model's demo code.
    """
    absent = (position < 0)[..., None]
    if not rows.shape[0]:  # nothing to gather from; all positions are -1
        rows = rows.new_zeros((1, rows.shape[1]))
    taken = torch.where(absent, 0.0, rows[position.clamp_min(0).long()].float())
    out = (taken * torch.where(absent, 0.0, weights[..., None])).sum(1)
    if shared is not None:
        out = out + shared.float()
    return out.to(rows.dtype)


# -- moe_experts --------------------------------------------------------------------------------


def _experts_inputs(
    make: Maker, *, tokens: int, topk: int, experts: int, dim: int, inter: int, kind: str, act: str,
    absent: float, shared: bool, dtype: torch.dtype,
) -> Inputs:  # fmt: skip
    return dict(
        x=make.randn(tokens, dim, dtype=dtype),
        ids=make_ids(make, tokens, topk, experts, absent),
        weights=make.randn(tokens, topk).abs() + 0.1,
        w13=make_packed(make, kind, experts, 2 * inter, dim),
        w2=make_packed(make, kind, experts, dim, inter),
        shared=make.randn(tokens, dim, dtype=dtype) if shared else None,
        act=act,
    )


def _experts_cost(
    x: Tensor, ids: Tensor, weights: Tensor, w13: list[Tensor], w2: list[Tensor],
    shared: Tensor | None = None, *, act: str = "none",
) -> Cost:  # fmt: skip
    experts, both, dim = w13[0].shape
    hit = min(ids.numel(), experts) / experts
    moved = 2 * x.numel() * x.element_size() + hit * (numbers(w13) + numbers(w2))
    return Cost(2.0 * ids.numel() * dim * both * 1.5, moved)


def _experts_invalid(
    x: Tensor, ids: Tensor, weights: Tensor, w13: list[Tensor], w2: list[Tensor],
    shared: Tensor | None = None, *, act: str = "none",
) -> str | None:  # fmt: skip
    if wrong := shaped("x", x, "tokens", "dim") or shaped("ids", ids, x.shape[0], "topk"):
        return wrong
    if shared is not None and (
        wrong := shaped("shared", shared, *x.shape) or typed(x.dtype, shared=shared)
    ):
        return wrong
    return (
        act_wrong(act)
        or floats(x=x)
        or typed(torch.int32, ids=ids)
        or typed(torch.float32, weights=weights)
        or shaped("weights", weights, *ids.shape)
        or packed_wrong(w13, 3, "w13")
        or packed_wrong(w2, 3, "w2")
    )


def _experts_unread(
    x: Tensor, ids: Tensor, weights: Tensor, w13: list[Tensor], w2: list[Tensor],
    shared: Tensor | None = None, *, act: str = "none",
) -> dict[str, Tensor]:  # fmt: skip
    return {"x": (ids < 0).all(1)[:, None].expand(x.shape), "weights": ids < 0}


@composite(
    uses=(permute, grouped_linear, silu_mul, unpermute),
    version=1,
    constant=("topk", "experts", "dim", "inter", "kind", "act", "absent", "shared", "dtype"),
    variable={"tokens": "x[0]"},
    inputs=_experts_inputs,
    cases=(
        *(
            case(name, tokens=tokens, topk=topk, experts=experts, dim=dim, inter=inter, kind=kind,
                 act=act, absent=absent, shared=shared, dtype=dtype)
            for name, tokens, topk, experts, dim, inter, kind, act, absent, shared, dtype in (
                ("empty", 0, 2, 4, 64, 32, "bfloat16", "none", 0.0, True, torch.bfloat16),
                ("one", 1, 4, 16, 64, 32, "bfloat16", "none", 0.0, True, torch.bfloat16),
                ("odd", 63, 3, 7, 40, 24, "float32", "none", 0.0, False, torch.float32),
                ("mixed", 5, 2, 4, 64, 32, "bfloat16", "none", 0.0, True, torch.float32),
                ("absent", 65, 4, 9, 64, 32, "bfloat16", "none", 0.6, True, torch.bfloat16),
                ("one_absent", 1, 4, 8, 64, 32, "float32", "none", 0.5, False, torch.float32),
                ("all_absent", 5, 2, 4, 64, 32, "bfloat16", "none", 1.0, True, torch.bfloat16),
                ("fp8", 65, 4, 8, 256, 128, "fp8", "fp8_pow2", 0.0, True, torch.bfloat16),
                ("fp8_one", 1, 4, 16, 256, 128, "fp8", "fp8_pow2", 0.0, True, torch.bfloat16),
                ("fp8_plain", 9, 2, 4, 128, 192, "fp8", "fp8", 0.3, False, torch.float32),
                ("fp8_weight", 9, 2, 4, 200, 72, "fp8", "none", 0.0, False, torch.bfloat16),
            )
        ),
        *(
            case(f"model_m{tokens}", model=True, tokens=tokens, topk=8, experts=32, dim=7168,
                 inter=2048, kind="fp8", act="fp8_pow2", absent=0.875, shared=True,
                 dtype=torch.bfloat16)
            for tokens in (64, 4096)
        ),
    ),
    check=by_act(5e-5, roundings=2),
    cost=_experts_cost,
    invalid=_experts_invalid,
    unread=_experts_unread,
)  # fmt: skip
def moe_experts(
    x: Tensor, ids: Tensor, weights: Tensor, w13: list[Tensor], w2: list[Tensor],
    shared: Tensor | None = None, *, act: str = "none",
) -> Tensor:  # fmt: skip
    """The routed experts of one layer on this rank: sum over a token's experts of
    weight * w2(silu(gate x) * (up x)), plus the shared expert's output.

    x        [tokens, dim] bf16, fp16 or fp32
    ids      [tokens, topk] int32 in [0, experts), -1 = not on this rank
    weights  [tokens, topk] fp32; not read where ids are -1
    w13      packed [experts, 2 * inter, dim]: gate rows, then up rows
    w2       packed [experts, dim, inter]
    shared   [tokens, dim] x's dtype, or None
    act      how both products round their inputs, as in `linear`
    -> out   [tokens, dim] x's dtype; the sum is in fp32 and rounded once

    Source: `Expert` and `MoE` of the model's demo code.
    """
    rows, layout, position = permute(x, ids, experts=w13[0].shape[0])
    hidden = silu_mul(grouped_linear(rows, w13, layout, act=act))
    return unpermute(grouped_linear(hidden, w2, layout, act=act), position, weights, shared)
