"""Models as outlines: layers with every weight of its shape and dtype, and no data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dsa_hal.model.config import ModelConfig
from dsa_hal.model.schema import TensorSpec, expected


class Outline:
    """Reads like a `Checkpoint` in FP8 or bf16, as the config says; its tensors are on "meta"."""

    path = Path("an outline")

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.weights_dtype = config, "bf16" if config.quant is None else "fp8"
        self._specs = expected(config)

    def notes(self) -> list[str]:
        return []

    def tensor(self, name: str) -> Tensor:
        if name == "lm_head.weight" and name not in self._specs:  # tied
            name = "model.embed_tokens.weight"
        return torch.empty(self._specs[name].shape, dtype=torch.bfloat16, device="meta")

    def linear(self, name: str) -> tuple[Tensor, Tensor | None]:
        return self._linear(self._specs[name.removesuffix(".weight") + ".weight"])

    def expert_stack(
        self, layer: int, part: Literal["gate_up", "down"]
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        names = ("gate_proj", "up_proj") if part == "gate_up" else ("down_proj",)
        stem = f"model.layers.{layer}.mlp.experts.0."
        made = [self._linear(self._specs[f"{stem}{name}.weight"]) for name in names]
        weight = torch.cat([weight for weight, _ in made])
        scales = [scale for _, scale in made if scale is not None]
        for _ in range(self.config.n_routed_experts):
            yield weight, torch.cat(scales) if scales else None

    def _linear(self, spec: TensorSpec) -> tuple[Tensor, Tensor | None]:
        if self.config.quant is None:
            return torch.empty(spec.shape, dtype=torch.bfloat16, device="meta"), None
        weight = torch.empty(spec.shape, dtype=torch.float8_e4m3fn, device="meta")
        return weight, torch.empty(spec.scale_shape, device="meta")
