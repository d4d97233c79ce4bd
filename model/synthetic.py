"""Weights without a checkpoint: random ones of any config's shapes, made on the device when they
are read, for measuring layers whose weights are not at hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dsa_hal.model.config import ModelConfig, Quant, Rope
from dsa_hal.model.schema import TensorSpec, expected

PUBLISHED = ModelConfig(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
    num_hidden_layers=61, first_k_dense_replace=3, num_attention_heads=128, n_routed_experts=256,
    n_shared_experts=1, num_experts_per_tok=8, n_group=8, topk_group=4, q_lora_rank=1536,
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, index_n_heads=64,
    index_head_dim=128, index_topk=2048, routed_scaling_factor=2.5,
    rope=Rope(type="yarn", factor=40.0, mscale=1.0, mscale_all_dim=1.0), quant=Quant(),
)  # fmt: skip
"""DeepSeek-V3.2's sizes and rules: 671B parameters."""


class RandomWeights:
    """Reads like a `Checkpoint`, and holds nothing.

    Linears are e4m3 of deviation 1 with scales that make it fan_in^-0.5, or bf16 where the config
    quantises nothing; norms are 1 and biases 0. A tensor read twice differs.
    """

    path = Path("random weights")

    def __init__(self, config: ModelConfig, device: torch.device, seed: int = 0) -> None:
        self.config, self.weights_dtype = config, "bf16" if config.quant is None else "fp8"
        self._specs = expected(config)
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def tensor(self, name: str) -> Tensor:
        """A tensor without scales, bf16."""
        shape = self._specs[name].shape
        if len(shape) == 1:
            value = 0.0 if name.endswith("bias") else 1.0
            return torch.full(shape, value, dtype=torch.bfloat16, device=self._device)
        return self._random(shape, torch.bfloat16, shape[1] ** -0.5)

    def linear(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A weight [out, in], and its scales if it is e4m3; `name` with or without ".weight"."""
        return self._linear(self._specs[name.removesuffix(".weight") + ".weight"])

    def expert_stack(
        self, layer: int, part: Literal["gate_up", "down"]
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """A layer's routed experts one by one, as `Checkpoint.expert_stack` gives them."""
        names = ("gate_proj", "up_proj") if part == "gate_up" else ("down_proj",)
        stem = f"model.layers.{layer}.mlp.experts.0."
        specs = [self._specs[f"{stem}{name}.weight"] for name in names]
        for _ in range(self.config.n_routed_experts):
            made = [self._linear(spec) for spec in specs]
            weights, scales = [w for w, _ in made], [s for _, s in made if s is not None]
            joined = torch.cat([w.view(torch.uint8) for w in weights]).view(weights[0].dtype)
            yield joined, torch.cat(scales) if scales else None

    def _linear(self, spec: TensorSpec) -> tuple[Tensor, Tensor | None]:
        deviation = spec.shape[1] ** -0.5
        if self.config.quant is None:
            return self._random(spec.shape, torch.bfloat16, deviation), None
        scale = torch.full(spec.scale_shape, deviation, device=self._device)
        return self._random(spec.shape, torch.float8_e4m3fn, 1.0), scale

    def _random(self, shape: tuple[int, ...], dtype: torch.dtype, deviation: float) -> Tensor:
        made = torch.empty(shape, device=self._device)
        bound = deviation * math.sqrt(3)  # of a uniform distribution, which is quicker to draw
        return made.uniform_(-bound, bound, generator=self._generator).to(dtype)
