"""Feed-forward parts: the dense MLP, and the mixture of experts with its fp32 gate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dsa_hal.model.binding import ints, meta
from dsa_hal.model.layers import Mlp
from dsa_hal.model.weights import Loader
from dsa_hal.ops.moe import moe_experts
from dsa_hal.ops.routing import route


def mlp(load: Loader, layer: int, name: str = "mlp.") -> Mlp:
    """The gated MLP under `name` of a layer: a dense layer's, or the shared experts as one."""
    c, at = load.checkpoint.config, f"model.layers.{layer}.{name}"
    w13, act = load.packed(at + "gate_proj", at + "up_proj")
    w2, act_down = load.packed(at + "down_proj")
    inter = c.intermediate_size if name == "mlp." else c.shared_intermediate_size
    return Mlp(
        load.bind, w13, w2, hidden=c.hidden_size, inter=inter, dtype=load.formats.activations,
        act=act, act_down=act_down,
    )  # fmt: skip


class Moe:
    """One sparse layer's feed-forward part: x [tokens, hidden] -> [tokens, hidden].

    Routed experts by group-limited scores, corrected by a bias that selects and does not weigh;
    the shared experts are added before the one rounding of the sum.
    """

    def __init__(self, load: Loader, layer: int) -> None:
        c, at = load.checkpoint.config, f"model.layers.{layer}.mlp.gate."
        self.gate = load.exact(at + "weight")
        self.bias = load.plain(at + "e_score_correction_bias")
        self.shared = mlp(load, layer, "mlp.shared_experts.")
        self.w13, self.w2, self.act = load.experts(layer)
        self.routing: dict[str, Any] = dict(
            topk=c.num_experts_per_tok, groups=c.n_group, topk_groups=c.topk_group,
            scale=c.routed_scaling_factor, score=c.scoring_func, normalize=c.norm_topk_prob,
        )  # fmt: skip
        x, k = meta(2, c.hidden_size, dtype=load.formats.activations), c.num_experts_per_tok
        self._route = load.bind(route, meta(2, c.n_routed_experts), self.bias, **self.routing)
        self._experts = load.bind(
            moe_experts, x, ints(2, k), meta(2, k), self.w13, self.w2, x, act=self.act
        )

    def __call__(self, x: Tensor) -> Tensor:
        ids, weights = self._route(self.gate(x.float()), self.bias, **self.routing)
        return self._experts(x, ids, weights, self.w13, self.w2, self.shared(x), act=self.act)
