"""Number formats of a loaded model: what the checkpoint implies, and what may be set apart."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from dsa_hal.errors import ConfigError
from dsa_hal.model.config import ModelConfig, Quant
from dsa_hal.ops.layout import KVLayout
from dsa_hal.target import Architecture

FORMATS = ("fp8", "bf16", "fp32")
CACHES = ("fp8", "int8", "bf16", "fp32")
"""What the two caches may be as well as weights; int8 is for them alone."""

_FLOATS = {"bf16": torch.bfloat16, "fp32": torch.float32}
_KNOWN = {"weights": FORMATS, "activations": tuple(_FLOATS)}


@dataclass(frozen=True)
class Precision:
    """A wish; each field is "fp8", "bf16" or "fp32", of the caches "int8" as well. None follows the
    checkpoint for the weights, and the weights for the rest; a cache that the device's kernels do
    not take in that format is "bf16" then.

    weights       linears; "fp8" also rounds their inputs to FP8
    index_cache   the indexer's keys; "fp8" is 132 bytes for a key of 128, "int8" 130, with Hadamard
                  rotation and queries of that type; unquantised keys need neither, they cancel
    latent_cache  MLA's latents; "fp8" and "int8" are 656 bytes for a latent of 512 + 64
    activations   between the linears; not "fp8", with which None means bf16
    """

    weights: str | None = None
    index_cache: str | None = None
    latent_cache: str | None = None
    activations: str | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            known = _KNOWN.get(each.name, CACHES)
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
    page_size      tokens of a page of either cache
    """

    weights: str
    activations: torch.dtype
    act: str
    pow2: bool
    latent: KVLayout
    index: KVLayout
    page_size: int = Architecture.page_size

    @property
    def quantize_index(self) -> str:
        """What `indexer_qk` makes of the indexer's queries."""
        return self.index.codes

    def __str__(self) -> str:
        caches = f"latents {self.latent.spec}, index keys {self.index.spec}"
        computed = str(self.activations).removeprefix("torch.")
        return f"weights {self.weights}, activations {computed}, {caches}"


def resolve(
    wish: Precision | str | None, config: ModelConfig, stored: str,
    limits: Architecture | None = None,
) -> Formats:  # fmt: skip
    """The formats for a checkpoint whose weights are `stored` as "fp8", "bf16", "fp16" or "fp32",
    on the architecture that `limits` describes; None takes every format.

    fp16 weights are held as fp32, which loses nothing. Raises ConfigError for a format that is not
    known, or that this model's sizes or the architecture cannot have.
    """
    wanted = wish if isinstance(wish, Precision) else Precision(weights=wish)
    weights = wanted.weights or ("fp32" if stored == "fp16" else stored)
    quant = config.quant or Quant()
    if weights == "fp8" and config.quant is None:
        try:
            replace(config, quant=quant)
        except ConfigError as error:
            raise ConfigError(f"weights cannot be held as fp8: {error}") from None
    rank, rope, dim = config.kv_lora_rank, config.qk_rope_head_dim, config.index_head_dim
    latent = _cache("latent", wanted.latent_cache, weights, limits)
    index = _cache("index", wanted.index_cache, weights, limits)
    latents = KVLayout.parse(f"{latent}/{rank}+{rope}")
    keys = KVLayout.parse(f"{index}/{dim}")
    if latents.group and rank % 128:
        raise ConfigError(
            f"latents cannot be cached as {latents.codes}: kv_lora_rank is {rank}, and their scales"
            " cover 128 values each; ask for latent_cache bf16 or fp32"
        )
    if keys.group and dim & (dim - 1):
        raise ConfigError(
            f"index keys cannot be cached as {keys.codes}: index_head_dim is {dim}, and their"
            " Hadamard rotation needs a power of two; ask for index_cache bf16 or fp32"
        )
    rounded = "fp8_pow2" if quant.pow2_scales else "fp8"
    return Formats(
        weights=weights,
        activations=_FLOATS[wanted.activations or ("fp32" if weights == "fp32" else "bf16")],
        act=rounded if weights == "fp8" else "none",
        pow2=quant.pow2_scales,
        latent=latents,
        index=keys,
        page_size=page_size(limits),
    )


def page_size(limits: Architecture | None) -> int:
    """Tokens of a page of the caches."""
    return Architecture.page_size if limits is None else limits.page_size


def _cache(kind: str, wish: str | None, weights: str, limits: Architecture | None) -> str:
    """The form of a cache's layout: as wished, else as the weights, or bf16 where the kernels do
    not take that."""
    name = f"{kind}_{wish or weights}"
    if limits is None or not limits.caches:
        return name
    if wish is None and name not in limits.caches:
        name = f"{kind}_bf16"
    if name not in limits.caches:
        offered = [key.removeprefix(f"{kind}_") for key in limits.caches if key.startswith(kind)]
        raise ConfigError(
            f"{kind}_cache is to be {wish or weights}; the kernels for {limits.device} take"
            f" {', '.join(offered) or 'none'}"
        )
    return limits.caches[name]
