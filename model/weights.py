"""From a checkpoint's tensors to packed weights on a device, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from dsa_hal.errors import CheckpointError
from dsa_hal.model.binding import Binder
from dsa_hal.model.config import BLOCK, ModelConfig
from dsa_hal.model.layers import Linear, Linears
from dsa_hal.model.precision import Formats
from dsa_hal.model.schema import expected
from dsa_hal.ops.packed import pack_weight
from dsa_hal.ops.quant import dequantize_fp8, quantize_fp8

Progress = Callable[[int, int], None]
"""Called as (tensors read, tensors in all)."""


class Source(Protocol):
    """Where weights come from, under canonical names: `Checkpoint` says what each method gives."""

    path: Path
    config: ModelConfig
    weights_dtype: str

    def tensor(self, name: str) -> Tensor: ...
    def linear(self, name: str) -> tuple[Tensor, Tensor | None]: ...
    def expert_stack(
        self, layer: int, part: Literal["gate_up", "down"]
    ) -> Iterator[tuple[Tensor, Tensor | None]]: ...


class Loader:
    """Reads weights in the formats wanted and packs them as the bound backend likes them.

    What it returns never shares memory with the checkpoint's files, so that they may go, and so
    that no file page stays resident beside the weight made of it.
    """

    def __init__(
        self,
        checkpoint: Source,
        formats: Formats,
        bind: Binder,
        device: torch.device,
        progress: Progress | None = None,
    ) -> None:
        self.checkpoint, self.formats, self.bind, self.device = checkpoint, formats, bind, device
        self._progress, self._done = progress, 0
        self._total = len(expected(checkpoint.config))
        self._float = torch.float32 if formats.weights == "fp32" else torch.bfloat16

    def plain(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor that is never quantised: norms, gates, embeddings."""
        tensor = self.checkpoint.tensor(name).to(self.device, dtype, copy=True)
        self._count(1)
        return tensor

    def exact(self, name: str) -> Linear:
        """A linear in fp32, never quantised: the gate, weights_proj and lm_head."""
        weight = self.plain(name)
        return Linear(self.bind, self._pack(weight, None), weight.shape[1], torch.float32)

    def packed(self, *names: str) -> tuple[list[Tensor], str]:
        """Linears stacked along their outputs and packed, and how their input is to be rounded."""
        weight, scale = _stack([self._linear(name) for name in names], names)
        return self._pack(weight, scale), self._act(scale)

    def linears(self, *names: str) -> Linears:
        """Linears of one input, joined into one product where FP8's 128-row blocks allow it."""
        read = [self._linear(name) for name in names]
        inputs = read[0][0].shape[1]
        sizes = [weight.shape[0] for weight, _ in read]
        quantised = {scale is not None for _, scale in read}
        apart = len(quantised) > 1 or (True in quantised and any(n % BLOCK for n in sizes[:-1]))
        groups = [[i] for i in range(len(read))] if apart else [list(range(len(read)))]
        parts = []
        for group in groups:
            weight, scale = _stack([read[i] for i in group], [names[i] for i in group])
            linear = Linear(
                self.bind, self._pack(weight, scale), inputs, self.formats.activations,
                self._act(scale),
            )  # fmt: skip
            parts.append((linear, [sizes[i] for i in group]))
        return Linears(parts)

    def multiplied_out(self, name: str) -> tuple[Tensor, list[Tensor]]:
        """A linear without scales, [out, in], and the same packed for `linear`: one tensor where
        the backend's packing keeps floats as they are.

        An FP8 weight takes the dtype that the backend's packing gives it, if that is one float
        tensor (fp32 on processors), else the dtype of the activations.
        """
        weight, scale = self._linear(name)
        if scale is not None:
            packed = self._pack(weight, scale)
            alone = len(packed) == 1 and packed[0].dtype in (torch.float32, torch.bfloat16)
            dtype = packed[0].dtype if alone else self.formats.activations
            weight = _multiplied_out(weight, scale, dtype)
        return weight, self._pack(weight, None)

    def experts(self, layer: int) -> tuple[list[Tensor], list[Tensor], str]:
        """A layer's routed experts, gate and up joined, then down; and how inputs are rounded.

        Packed expert by expert into stacks made once, so that one expert at most exists twice.
        """
        quantised: set[bool] = set()
        gate_up = self._expert_stack(layer, "gate_up", quantised)
        down = self._expert_stack(layer, "down", quantised)
        if len(quantised) > 1:
            raise CheckpointError(
                f"{self.checkpoint.path}: some routed experts of layer {layer} are FP8 and some are"
                " not; convert the checkpoint so that all agree"
            )
        return gate_up, down, self.formats.act if True in quantised else "none"

    def _expert_stack(
        self, layer: int, part: Literal["gate_up", "down"], quantised: set[bool]
    ) -> list[Tensor]:
        stack: list[Tensor] = []
        count = self.checkpoint.config.n_routed_experts
        for expert, stored in enumerate(self.checkpoint.expert_stack(layer, part)):
            weight, scale = self._wanted(*stored)
            quantised.add(scale is not None)
            packed = self._pack(weight[None], None if scale is None else scale[None])
            if not stack:
                stack = [t.new_empty(count, *t.shape[1:]) for t in packed]
            for whole, t in zip(stack, packed, strict=True):
                whole[expert] = t[0]
            self._count(2 if part == "gate_up" else 1)
        return stack

    def _linear(self, name: str) -> tuple[Tensor, Tensor | None]:
        stored = self.checkpoint.linear(name)
        self._count(1)
        return self._wanted(*stored)

    def _wanted(self, weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A stored linear on the device, in the format wanted. A linear that an FP8 checkpoint
        itself leaves unquantised stays so."""
        if scale is not None:
            weight = weight.to(self.device, copy=True)
            scale = scale.to(self.device, copy=True)
            if self.formats.weights == "fp8":
                return weight, scale
            return _multiplied_out(weight, scale, self._float), None
        if self.formats.weights == "fp8" and self.checkpoint.weights_dtype != "fp8":
            weight = weight.to(self.device)
            return quantize_fp8(weight, group=BLOCK, block_rows=BLOCK, pow2=self.formats.pow2)
        return weight.to(self.device, self._float, copy=True), None

    def _pack(self, weight: Tensor, scale: Tensor | None) -> list[Tensor]:
        return self.bind(pack_weight, weight, scale)(weight, scale)

    def _act(self, scale: Tensor | None) -> str:
        return self.formats.act if scale is not None else "none"

    def _count(self, tensors: int) -> None:
        self._done += tensors
        if self._progress is not None:
            self._progress(self._done, self._total)


def _stack(
    parts: Sequence[tuple[Tensor, Tensor | None]], names: Sequence[str]
) -> tuple[Tensor, Tensor | None]:
    """Weights and scales joined along their rows; all FP8 or none, FP8 in whole blocks of rows."""
    if len(parts) == 1:
        return parts[0]
    weights, scales = [w for w, _ in parts], [s for _, s in parts if s is not None]
    if not scales:
        return torch.cat(weights), None
    if len(scales) != len(parts):
        raise CheckpointError(
            f"{' and '.join(names)} are used as one weight, but only some of them are FP8; convert"
            " the checkpoint so that they agree"
        )
    joined = torch.cat([w.view(torch.uint8) for w in weights]).view(weights[0].dtype)
    return joined, torch.cat(scales)


def _multiplied_out(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize_fp8(weight, scale, group=BLOCK, block_rows=BLOCK, out_dtype=dtype)
