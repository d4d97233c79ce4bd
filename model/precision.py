"""Number formats of a loaded model: what the checkpoint implies, and what may be set apart."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from dsa_hal.errors import ConfigError
from dsa_hal.model.config import ModelConfig, Quant
from dsa_hal.ops.layout import KVLayout

FORMATS = ("fp8", "bf16", "fp32")
_FLOATS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """A wish; each field is "fp8", "bf16" or "fp32". None follows the checkpoint for the weights,
    and the weights for the rest.

    weights       linears; "fp8" also rounds their inputs to FP8
    index_cache   the indexer's keys; "fp8" is 132 bytes for a key of 128, with Hadamard rotation
                  and FP8 queries; unquantised keys need neither, they cancel
    latent_cache  MLA's latents; "fp8" is 656 bytes for a latent of 512 + 64
    activations   between the linears; not "fp8", with which None means bf16
    """

    weights: str | None = None
    index_cache: str | None = None
    latent_cache: str | None = None
    activations: str | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            known = tuple(_FLOATS) if each.name == "activations" else FORMATS
            if (value := getattr(self, each.name)) not in (None, *known):
                raise ConfigError(
                    f"precision of {each.name} is {value!r}; known are {', '.join(known)}"
                )


@dataclass(frozen=True)
class Formats:
    """A wish resolved against one checkpoint.

    weights        "fp8", "bf16" or "fp32"
    activations    dtype of the residual stream
    act            how `linear` rounds its input: "none", "fp8", "fp8_pow2"
    pow2           FP8 scales are powers of two
    latent, index  the caches' layouts
    """

    weights: str
    activations: torch.dtype
    act: str
    pow2: bool
    latent: KVLayout
    index: KVLayout

    @property
    def quantize_index(self) -> bool:
        return self.index.group > 0

    def __str__(self) -> str:
        caches = f"latents {self.latent.spec}, index keys {self.index.spec}"
        computed = str(self.activations).removeprefix("torch.")
        return f"weights {self.weights}, activations {computed}, {caches}"


def resolve(wish: Precision | str | None, config: ModelConfig, stored: str) -> Formats:
    """The formats for a checkpoint whose weights are `stored` as "fp8", "bf16", "fp16" or "fp32".

    fp16 weights are held as fp32, which loses nothing. Raises ConfigError for a format that is not
    known or that this model's sizes cannot have.
    """
    wanted = wish if isinstance(wish, Precision) else Precision(weights=wish)
    weights = wanted.weights or ("fp32" if stored == "fp16" else stored)
    quant = config.quant or Quant()
    if weights == "fp8" and config.quant is None:
        try:
            replace(config, quant=quant)
        except ConfigError as error:
            raise ConfigError(f"weights cannot be held as fp8: {error}") from None
    latent, index = wanted.latent_cache or weights, wanted.index_cache or weights
    rank, rope, dim = config.kv_lora_rank, config.qk_rope_head_dim, config.index_head_dim
    if latent == "fp8" and rank % 128:
        raise ConfigError(
            f"latents cannot be cached as fp8: kv_lora_rank is {rank}, and their scales cover 128"
            " values each; ask for latent_cache bf16 or fp32"
        )
    if index == "fp8" and dim & (dim - 1):
        raise ConfigError(
            f"index keys cannot be cached as fp8: index_head_dim is {dim}, and their Hadamard"
            " rotation needs a power of two; ask for index_cache bf16 or fp32"
        )
    rounded = "fp8_pow2" if quant.pow2_scales else "fp8"
    return Formats(
        weights=weights,
        activations=_FLOATS[wanted.activations or ("fp32" if weights == "fp32" else "bf16")],
        act=rounded if weights == "fp8" else "none",
        pow2=quant.pow2_scales,
        latent=KVLayout.parse(f"latent_{latent}/{rank}+{rope}"),
        index=KVLayout.parse(f"index_{index}/{dim}"),
    )
