"""The gate of a mixture of experts: which experts a token goes to, and with what weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsa_hal.case import Cost, Inputs, Maker, case
from dsa_hal.check import Finding, Report, close, form
from dsa_hal.ops._contract import shaped, typed
from dsa_hal.registry import op

SCORES = ("sigmoid", "softmax")


def _route_inputs(
    make: Maker, *, tokens: int, experts: int, topk: int, groups: int, topk_groups: int,
    scale: float, score: str, biased: bool, normalize: bool, kind: str,
) -> Inputs:  # fmt: skip
    logits = make.randn(tokens, experts)
    bias = make.randn(experts, scale=0.5) if biased else None
    if kind == "ties":  # few distinct values, so that every cut falls between equal scores
        logits = logits.round() * 0.5
        bias = None if bias is None else bias.round() * 0.25
    if kind == "negative" and bias is not None:  # all selection scores below the 0 of a naive mask
        bias = bias - 3.0
    return dict(
        logits=logits, bias=bias, topk=topk, groups=groups, topk_groups=topk_groups, scale=scale,
        score=score, normalize=normalize,
    )  # fmt: skip


def _route_cost(
    logits: Tensor, bias: Tensor | None = None, *, topk: int, groups: int = 1,
    topk_groups: int = 1, scale: float = 1.0, score: str = "sigmoid", normalize: bool = True,
) -> Cost:  # fmt: skip
    return Cost(10.0 * logits.numel(), 4 * logits.numel() + 8 * logits.shape[0] * topk)


def _route_invalid(
    logits: Tensor, bias: Tensor | None = None, *, topk: int, groups: int = 1,
    topk_groups: int = 1, scale: float = 1.0, score: str = "sigmoid", normalize: bool = True,
) -> str | None:  # fmt: skip
    if wrong := shaped("logits", logits, "tokens", "experts"):
        return wrong
    experts = logits.shape[1]
    if wrong := typed(torch.float32, logits=logits, bias=bias):
        return wrong
    if bias is not None and (wrong := shaped("bias", bias, experts)):
        return wrong
    if groups < 1 or experts % groups:
        return f"{experts} experts do not form {groups} equal groups"
    if not 1 <= topk_groups <= groups:
        return f"topk_groups is {topk_groups}; expected 1 to {groups}"
    eligible = experts // groups * topk_groups
    if not 1 <= topk <= eligible:
        return f"topk is {topk}; {topk_groups} groups of {experts // groups} offer {eligible}"
    return None if score in SCORES else f"score is {score!r}; expected sigmoid or softmax"


def expert_scores(logits: Tensor, score: str) -> Tensor:
    """The score of each expert before bias and groups: [tokens, experts] fp32."""
    return torch.sigmoid(logits) if score == "sigmoid" else torch.softmax(logits, -1)


def gate_weights(chosen: Tensor, score: str, normalize: bool, scale: float) -> Tensor:
    """The weights of the chosen experts [tokens, topk] from their unbiased scores."""
    if normalize and score == "sigmoid":
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    return chosen * scale


def _route_check(got: Sequence[Tensor], want: Sequence[Tensor], inputs: Inputs) -> Report:
    """Ids must be the reference's, in its order, but that two unlike scores closer than rounding
    may change places; weights must fit the ids that were chosen."""
    if len(got) != 2:
        return Report((Finding("results", "count", str(len(got)), "2", False),))
    if wrong := [*form("ids", got[0], want[0]), *form("weights", got[1], want[1])]:
        return Report(tuple(wrong))
    ids, experts = got[0].long(), inputs["logits"].shape[1]
    outside = int(((ids < 0) | (ids >= experts)).sum())
    if outside:
        return Report((Finding("ids", f"outside [0, {experts})", float(outside), 0.0, False),))
    ordered = ids.sort(-1).values
    repeats = int((ordered[:, 1:] == ordered[:, :-1]).sum())
    scores = expert_scores(inputs["logits"], inputs["score"])
    picking = scores if inputs["bias"] is None else scores + inputs["bias"]
    apart = (picking.gather(1, ids) - picking.gather(1, want[0].long())).abs()
    differ = ids != want[0].long()
    misplaced = int((differ & ((apart == 0) | (apart > 1e-6))).sum())
    weights = gate_weights(
        scores.gather(1, ids), inputs["score"], inputs["normalize"], inputs["scale"]
    )
    return Report((
        Finding("ids", "repeats", float(repeats), 0.0, repeats == 0),
        Finding("ids", "misplaced", float(misplaced), 0.0, misplaced == 0),
        *close(abs=1e-6, rel=1e-5)("weights", got[1], weights),
    ))  # fmt: skip


@op(
    version=1,
    constant=("experts", "topk", "groups", "topk_groups", "scale", "score", "biased", "normalize",
              "kind"),
    variable={"tokens": "logits[0]"},
    inputs=_route_inputs,
    cases=(
        *(
            case(name, tokens=tokens, experts=experts, topk=topk, groups=groups, topk_groups=kept,
                 scale=2.5, score=score, biased=bias, normalize=normal, kind=kind, traps=traps)
            for name, tokens, experts, topk, groups, kept, score, bias, normal, kind, traps in (
                ("empty", 0, 16, 4, 1, 1, "sigmoid", True, True, "plain", ()),
                ("one", 1, 16, 4, 1, 1, "sigmoid", True, True, "plain", ()),
                ("odd", 63, 24, 3, 4, 2, "sigmoid", True, True, "plain", ()),
                ("ties", 65, 64, 8, 8, 4, "sigmoid", True, True, "ties", (14,)),
                ("no_bias", 9, 32, 5, 4, 3, "sigmoid", False, True, "plain", ()),
                ("no_bias_ties", 33, 32, 5, 4, 3, "sigmoid", False, True, "ties", ()),
                ("softmax", 17, 32, 6, 1, 1, "softmax", False, True, "plain", ()),
                ("unnormalized", 5, 16, 2, 1, 1, "sigmoid", True, False, "plain", ()),
                ("negative", 65, 64, 8, 8, 2, "sigmoid", True, True, "negative", (17,)),
                ("singles", 7, 8, 4, 8, 4, "sigmoid", True, True, "plain", ()),
                ("everyone", 3, 8, 8, 2, 2, "sigmoid", True, True, "plain", ()),
            )
        ),
        *(
            case(f"model_m{tokens}", model=True, tokens=tokens, experts=256, topk=8, groups=8,
                 topk_groups=4, scale=2.5, score="sigmoid", biased=True, normalize=True,
                 kind="plain", traps=(17,))
            for tokens in (1, 64, 128, 4096)
        ),
    ),
    check=_route_check,
    cost=_route_cost,
    outputs=("ids", "weights"),
    invalid=_route_invalid,
)  # fmt: skip
def route(
    logits: Tensor, bias: Tensor | None = None, *, topk: int, groups: int = 1,
    topk_groups: int = 1, scale: float = 1.0, score: str = "sigmoid", normalize: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Choose the experts of each token and their weights.

    The bias takes part in the choice and not in the weights. Groups are ranked by the sum of their
    two best biased scores (without a bias by their best score); only experts of the best
    `topk_groups` groups may be chosen.

    logits       [tokens, experts] fp32, without NaN
    bias         [experts] fp32 (`e_score_correction_bias`), or None
    groups       experts form this many equal groups of neighbours
    scale        the weights are multiplied by it
    score        "sigmoid" or "softmax" over all experts
    normalize    divide sigmoid weights by their sum + 1e-20; softmax weights never are
    -> ids       [tokens, topk] int32, best biased score first; equal scores (of groups as well):
                 the lower id first
    -> weights   [tokens, topk] fp32

    Source: `Gate` of the model's demo code; the tie rule is TileKernels'.
    """
    scores = expert_scores(logits.float(), score)
    picking = scores if bias is None else scores + bias
    if groups > 1:
        grouped = picking.view(-1, groups, picking.shape[1] // groups)
        best = grouped.sort(-1, descending=True).values[..., : 1 if bias is None else 2].sum(-1)
        order = best.sort(dim=1, descending=True, stable=True).indices[:, :topk_groups]
        kept = torch.zeros_like(best).scatter(1, order, 1.0)[..., None]
        picking = torch.where(kept > 0, grouped, -torch.inf).flatten(1)
    ids = picking.sort(dim=1, descending=True, stable=True).indices[:, :topk]
    return ids.int(), gate_weights(scores.gather(1, ids), score, normalize, scale)
