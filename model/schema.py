"""Every tensor the model reads: its name in both formats, its shape, how it is stored and cut.

Canonical names are Hugging Face's published ones, one tensor per expert. The demo's names and
its model-parallel cuts follow from the same rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dsa_hal.model.config import BLOCK, ModelConfig

Kind = Literal["linear", "plain"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor. `kind` "linear" is [out, in] and may be e4m3 with `scale_name` beside it;
    "plain" is bf16, fp16 or fp32. `shard_dim` is the axis the demo cuts between ranks, None when
    every rank holds all of it. `expert` is the routed expert it belongs to: experts are dealt
    out whole, in blocks of consecutive ids."""

    name: str
    demo_name: str
    shape: Shape
    kind: Kind
    shard_dim: int | None = None
    expert: int | None = None

    @property
    def scale_name(self) -> str:
        """Canonical name of the fp32 dequantisation scales (which multiply, despite "inv")."""
        return self.name + "_scale_inv"

    @property
    def demo_scale_name(self) -> str:
        return self.demo_name.removesuffix("weight") + "scale"

    @property
    def scale_shape(self) -> Shape:
        """One scale per 128x128 block, edges partial: [ceil(out / 128), ceil(in / 128)]."""
        return blocks(self.shape)


def blocks(shape: Shape) -> Shape:
    return tuple(-(-size // BLOCK) for size in shape)


# Name at Hugging Face, name in the demo, kind, axis cut between ranks, shape in the words of _dims.
_Row = tuple[str, str, Kind, int | None, str]

_EDGE: tuple[_Row, ...] = (
    ("model.embed_tokens.weight", "embed.weight", "plain", 0, "vocab hidden"),
    ("model.norm.weight", "norm.weight", "plain", None, "hidden"),
    ("lm_head.weight", "head.weight", "plain", 0, "vocab hidden"),
)
# The rest live inside layer N: prefix "model.layers.N." at Hugging Face, "layers.N." in the demo.
_ATTENTION: tuple[_Row, ...] = (
    ("input_layernorm.weight", "attn_norm.weight", "plain", None, "hidden"),
    ("self_attn.q_a_proj.weight", "attn.wq_a.weight", "linear", None, "q_rank hidden"),
    ("self_attn.q_a_layernorm.weight", "attn.q_norm.weight", "plain", None, "q_rank"),
    ("self_attn.q_b_proj.weight", "attn.wq_b.weight", "linear", 0, "q_heads q_rank"),
    ("self_attn.kv_a_proj_with_mqa.weight", "attn.wkv_a.weight", "linear", None, "latent hidden"),
    ("self_attn.kv_a_layernorm.weight", "attn.kv_norm.weight", "plain", None, "kv_rank"),
    ("self_attn.kv_b_proj.weight", "attn.wkv_b.weight", "linear", 0, "kv_heads kv_rank"),
    ("self_attn.o_proj.weight", "attn.wo.weight", "linear", 1, "hidden v_heads"),
)
_INDEX_HF, _INDEX, _PROJ = "self_attn.indexer.", "attn.indexer.", "weights_proj.weight"
_INDEXER: tuple[_Row, ...] = (
    (_INDEX_HF + "wq_b.weight", _INDEX + "wq_b.weight", "linear", None, "index_heads q_rank"),
    (_INDEX_HF + "wk.weight", _INDEX + "wk.weight", "linear", None, "index_dim hidden"),
    (_INDEX_HF + "k_norm.weight", _INDEX + "k_norm.weight", "plain", None, "index_dim"),
    (_INDEX_HF + "k_norm.bias", _INDEX + "k_norm.bias", "plain", None, "index_dim"),
    (_INDEX_HF + _PROJ, _INDEX + _PROJ, "plain", None, "index_count hidden"),
)
_FFN: tuple[_Row, ...] = (
    ("post_attention_layernorm.weight", "ffn_norm.weight", "plain", None, "hidden"),
)


def _mlp(hf: str, demo: str, cut: bool, width: str) -> tuple[_Row, ...]:
    across, along = (0, 1) if cut else (None, None)
    return (
        (f"{hf}gate_proj.weight", f"{demo}w1.weight", "linear", across, f"{width} hidden"),
        (f"{hf}up_proj.weight", f"{demo}w3.weight", "linear", across, f"{width} hidden"),
        (f"{hf}down_proj.weight", f"{demo}w2.weight", "linear", along, f"hidden {width}"),
    )


_DENSE = _mlp("mlp.", "ffn.", True, "dense")
_ROUTER: tuple[_Row, ...] = (
    ("mlp.gate.weight", "ffn.gate.weight", "plain", None, "experts hidden"),
    ("mlp.gate.e_score_correction_bias", "ffn.gate.bias", "plain", None, "experts"),
)
_SHARED = _mlp("mlp.shared_experts.", "ffn.shared_experts.", True, "shared")
_EXPERT = _mlp("mlp.experts.{expert}.", "ffn.experts.{expert}.", False, "expert")


def _dims(c: ModelConfig) -> dict[str, int]:
    return {
        "hidden": c.hidden_size,
        "vocab": c.vocab_size,
        "q_rank": c.q_lora_rank,
        "kv_rank": c.kv_lora_rank,
        "latent": c.kv_lora_rank + c.qk_rope_head_dim,
        "q_heads": c.num_attention_heads * c.qk_head_dim,
        "kv_heads": c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim),
        "v_heads": c.num_attention_heads * c.v_head_dim,
        "index_count": c.index_n_heads,
        "index_dim": c.index_head_dim,
        "index_heads": c.index_n_heads * c.index_head_dim,
        "experts": c.n_routed_experts,
        "dense": c.intermediate_size,
        "expert": c.moe_intermediate_size,
        "shared": c.shared_intermediate_size,
    }


def expected(config: ModelConfig) -> dict[str, TensorSpec]:
    """Specs of all tensors of the main model by canonical name, in the order of the forward pass.

    Scales are not listed: a linear has them exactly when its stored dtype is e4m3. Tied word
    embeddings leave `lm_head.weight` out.
    """
    return {spec.name: spec for spec in _specs(config)}


def _specs(config: ModelConfig) -> Iterator[TensorSpec]:
    dims = _dims(config)

    def spec(row: _Row, hf: str, demo: str, expert: int | None = None) -> TensorSpec:
        shape = tuple(dims[word] for word in row[4].split())
        names = hf + row[0], demo + row[1]
        if expert is not None:
            names = names[0].format(expert=expert), names[1].format(expert=expert)
        return TensorSpec(*names, shape, row[2], row[3], expert)

    embed, *head = _EDGE
    yield spec(embed, "", "")
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}.", f"layers.{layer}."
        rows = _ATTENTION + _INDEXER + _FFN
        rows += _ROUTER + _SHARED if config.is_moe(layer) else _DENSE
        yield from (spec(row, *at) for row in rows)
        if config.is_moe(layer):
            for expert in range(config.n_routed_experts):
                yield from (spec(row, *at, expert) for row in _EXPERT)
    for row in head:
        if not (config.tie_word_embeddings and row[0] == "lm_head.weight"):
            yield spec(row, "", "")


_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.*)")


def layer_beyond(name: str, config: ModelConfig) -> int | None:
    """Index of a layer after the main model's last (in either format's naming), else None.

    Such a layer is the multi-token prediction (MTP) module, and then holds `eh_proj.weight`.
    """
    match = _LAYER.match(name)
    if match is None or int(match[1]) < config.num_hidden_layers:
        return None
    return int(match[1])
