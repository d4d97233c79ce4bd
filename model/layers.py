"""The pieces that attention and MoE share: linears, the gated MLP, norms, the rotary table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsa_hal.model.binding import Binder, meta
from dsa_hal.model.config import ModelConfig
from dsa_hal.ops.norm import silu_mul
from dsa_hal.ops.packed import linear


class Linear:
    """x [tokens, in] -> [tokens, out] in x's dtype; `weight` is what `pack_weight` returned.

    act  how the input is rounded first: "none", "fp8", "fp8_pow2"
    """

    def __init__(
        self, bind: Binder, weight: list[Tensor], inputs: int, dtype: torch.dtype, act: str = "none"
    ) -> None:
        self.weight, self.act = weight, act
        self._linear = bind(linear, meta(1, inputs, dtype=dtype), weight, act=act)

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x, self.weight, act=self.act)


class Linears:
    """Several linears of one input, run as one product where their weights could be joined.

    parts   pairs of (linear, output sizes): a joined linear has several sizes
    """

    def __init__(self, parts: Sequence[tuple[Linear, Sequence[int]]]) -> None:
        self._parts = [(one, list(sizes)) for one, sizes in parts]

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The outputs [tokens, size] in order; those of a joined linear are views of one tensor."""
        outputs: list[Tensor] = []
        for one, sizes in self._parts:
            y = one(x)
            outputs += y.split(sizes, -1) if len(sizes) > 1 else [y]
        return outputs


class Mlp:
    """down(silu(gate(x)) * up(x)): dense layers and the shared experts. `w13` is gate then up."""

    def __init__(
        self, bind: Binder, w13: list[Tensor], w2: list[Tensor],
        *, hidden: int, inter: int, dtype: torch.dtype, act: str, act_down: str,
    ) -> None:  # fmt: skip
        self._w13 = Linear(bind, w13, hidden, dtype, act)
        self._w2 = Linear(bind, w2, inter, dtype, act_down)
        self._gated = bind(silu_mul, meta(1, 2 * inter, dtype=dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return self._w2(self._gated(self._w13(x)))


class RopeTable:
    """cos and sin per position, fp32 [positions, rope_dim] = [cos | sin], made as far as needed.

    Positions turn by fp32 products, as in the model's demo code and in transformers. The table at
    least doubles when it grows, so that decoding rarely rebuilds it.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._frequencies = config.rope_frequencies().to(device)
        self._factor = config.rope_attention_factor
        self._limit = config.max_position_embeddings
        self._table = torch.empty(0, config.qk_rope_head_dim, device=device)

    def upto(self, positions: int) -> Tensor:
        """A table of at least `positions` rows."""
        have = self._table.shape[0]
        if have < positions:
            rows = max(positions, min(2 * have, self._limit), 256)
            at = torch.arange(rows, dtype=torch.float32, device=self._table.device)
            angles = torch.outer(at, self._frequencies)
            self._table = torch.cat([angles.cos(), angles.sin()], -1) * self._factor
        return self._table
