"""route on Ascend."""

from typing import Any

from torch import Tensor

from dsa_hal.backends.npu._library import call, refusal
from dsa_hal.backends.npu._products import like, meta
from dsa_hal.ops.routing import route

SOFTMAX, SIGMOID = 0, 1
"""Values of `norm_type`."""

BEST, BEST_TWO = 0, 1
"""Values of `group_select_mode`: by what a group of experts is ranked."""


def _arguments(
    logits: Tensor, bias: Tensor | None, topk: int, groups: int, topk_groups: int, scale: float,
    score: str,
) -> dict[str, Any]:  # fmt: skip
    """renorm=0 scores before it selects. Weights come from unbiased scores, and only those of
    sigmoids are divided by their sum."""
    return dict(
        x=logits, k=topk, bias=bias, k_group=topk_groups, group_count=groups,
        group_select_mode=BEST if bias is None else BEST_TWO, renorm=0,
        norm_type=SIGMOID if score == "sigmoid" else SOFTMAX, out_flag=False,
        routed_scaling_factor=scale, eps=1e-20,
    )  # fmt: skip


def _why_not(
    logits: Tensor, bias: Tensor | None = None, *, topk: int, groups: int = 1,
    topk_groups: int = 1, scale: float = 1.0, score: str = "sigmoid", normalize: bool = True,
) -> str | None:  # fmt: skip
    if score == "sigmoid" and not normalize:
        return "npu_moe_gating_top_k divides the weights of sigmoids by their sum"
    one = meta(1, logits.shape[1], dtype=logits.dtype)
    flat = None if bias is None else like(bias)
    return refusal(
        "npu_moe_gating_top_k", **_arguments(one, flat, topk, groups, topk_groups, scale, score)
    )


@route.impl("npu", "moe_gating_top_k", contract=1, why_not=_why_not)
def chosen(
    logits: Tensor, bias: Tensor | None = None, *, topk: int, groups: int = 1,
    topk_groups: int = 1, scale: float = 1.0, score: str = "sigmoid", normalize: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The documented computation sorts stably, by scores of groups and of experts alike: of equal
    ones the lower is first."""
    if not logits.shape[0]:
        return route.reference(
            logits, bias, topk=topk, groups=groups, topk_groups=topk_groups, scale=scale,
            score=score, normalize=normalize,
        )  # fmt: skip
    flat = None if bias is None else bias.contiguous()
    weights, ids, _ = call(
        "npu_moe_gating_top_k",
        **_arguments(logits.contiguous(), flat, topk, groups, topk_groups, scale, score),
    )
    return ids, weights


route.impl("npu", "torch", contract=1, rank=-1)(route.reference)
