"""A small V3.2 configuration with every part of the published one; tests change what they need."""

from __future__ import annotations

from dsa_hal.model.config import ModelConfig, Quant, Rope

SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=256,
    intermediate_size=256,
    moe_intermediate_size=128,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=2,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
    index_n_heads=2,
    index_head_dim=64,
    index_topk=8,
    max_position_embeddings=4096,
    rope=Rope("yarn", factor=4.0, original_max_position_embeddings=1024),
    eos_token_ids=(1,),
    quant=Quant(),
)
