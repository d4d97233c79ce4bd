"""Random tiny checkpoints written by transformers, whose own model is the oracle of ours."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BASE: dict[str, Any] = dict(
    vocab_size=199, hidden_size=64, intermediate_size=96, moe_intermediate_size=24,
    num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1,
    n_routed_experts=16, routed_scaling_factor=2.5, kv_lora_rank=32, q_lora_rank=40,
    qk_rope_head_dim=8, v_head_dim=12, qk_nope_head_dim=16, topk_group=2, n_group=4,
    num_experts_per_tok=4, first_k_dense_replace=1, max_position_embeddings=4096,
    index_topk=8, index_head_dim=16, index_n_heads=16, initializer_range=0.12,
    bos_token_id=0, eos_token_id=1, attention_bias=False,
)  # fmt: skip


def _yarn(**more: float) -> dict[str, Any]:
    return dict(
        rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=32,
        beta_fast=32.0, beta_slow=1.0, **more,
    )  # fmt: skip


GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "yarn": dict(
        rope_parameters=_yarn(mscale=1.0, mscale_all_dim=1.0),
        n_group=2,
        topk_group=1,
        index_topk=5,
        index_head_dim=32,
    ),
    "mscale": dict(
        rope_parameters=_yarn(mscale=0.7, mscale_all_dim=0.4),
        n_group=1,
        topk_group=1,
        n_shared_experts=2,
        first_k_dense_replace=0,
        num_experts_per_tok=3,
        index_topk=12,
    ),
    "pattern": dict(
        rope_parameters=_yarn(),
        mlp_layer_types=["sparse", "dense", "sparse"],
        num_attention_heads=3,
        num_key_value_heads=3,
        qk_rope_head_dim=16,
        qk_nope_head_dim=20,
        v_head_dim=16,
        n_routed_experts=24,
        n_group=8,
        topk_group=3,
        routed_scaling_factor=1.0,
    ),
}


@contextmanager
def one_thread() -> Iterator[None]:
    """Products of tiny matrices are slower on more threads, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(folder: Path, geometry: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Save a random model and return transformers' own, in evaluation mode. Everything that an
    initialiser leaves at 0 or 1 (biases, norm weights) is made random as well."""
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

    torch.manual_seed(sum(map(ord, geometry)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = DeepseekV32Config(**(BASE | GEOMETRIES[geometry] | changes))
        model = DeepseekV32ForCausalLM(config).eval()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                tensor.data.normal_(0, 0.1)
            elif name.endswith(("norm.weight", "layernorm.weight")):
                tensor.data.normal_(1, 0.2)
            elif name.endswith("k_norm.bias"):
                tensor.data.normal_(0, 0.3)
        model.to(dtype).save_pretrained(folder)
    return model


def prompt(length: int, vocab: int = BASE["vocab_size"], seed: int = 0) -> Tensor:
    """Random token ids [1, length], int64, without the special tokens."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(2, vocab, (1, length), generator=generator)
