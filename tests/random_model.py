"""A small FP8 checkpoint with random weights and the published geometry, for tests to write."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from dsa_hal.model.config import ModelConfig, Quant, Rope
from dsa_hal.model.schema import TensorSpec, expected
from dsa_hal.ops.quant import quantize_fp8

_SEED = 20250929
_SPECIALS = ("<bos>", "<eos>")

CONFIG = ModelConfig(
    vocab_size=384,
    hidden_size=512,
    intermediate_size=1024,
    moe_intermediate_size=128,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=8,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    q_lora_rank=256,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    index_n_heads=32,
    index_head_dim=128,
    index_topk=256,
    max_position_embeddings=65536,
    rope=Rope(type="yarn", factor=16.0, mscale=1.0, mscale_all_dim=1.0),
    routed_scaling_factor=2.5,
    bos_token_id=0,
    eos_token_ids=(1,),
    quant=Quant(),
)


def random_checkpoint(folder: Path) -> Path:
    """Write the checkpoint into `folder`, made if absent; its bytes are the same everywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    save_file(dict(_tensors(tokenizer)), folder / "model.safetensors", metadata={"format": "pt"})
    bos, eos = _SPECIALS
    files = {
        "config.json": CONFIG.to_hf() | {"torch_dtype": "bfloat16"},
        "generation_config.json": {
            "bos_token_id": CONFIG.bos_token_id,
            "do_sample": True,
            "eos_token_id": CONFIG.eos_token_ids[0],
            "temperature": 1.0,
            "top_p": 0.95,
        },
        "tokenizer_config.json": {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": bos,
            "clean_up_tokenization_spaces": False,
            "eos_token": eos,
            "model_max_length": CONFIG.max_position_embeddings,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    return folder


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE without merges: one token a byte, after the specials at ids 0 and 1."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate((*_SPECIALS, *letters))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in _SPECIALS])
    return tokenizer


def _tensors(tokenizer: Tokenizer) -> Iterator[tuple[str, Tensor]]:
    for name, value in random_tensors(CONFIG, _SEED):
        if name == "lm_head.weight":
            value *= _likelihood(tokenizer)[:, None].to(value.dtype)
        yield name, value


def random_tensors(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model with random weights, by canonical name, in the published dtypes:
    linears e4m3 with their scales when `config.quant` is set, the routing bias fp32, else bf16."""
    generator = torch.Generator().manual_seed(seed)
    for spec in expected(config).values():
        value = _random(spec, generator)
        if spec.kind == "linear" and config.quant is not None:
            weight, scale = quantize_fp8.reference(value, block_rows=128)
            yield spec.name, weight
            yield spec.scale_name, scale
        elif spec.name.endswith("e_score_correction_bias"):
            yield spec.name, value
        else:
            yield spec.name, value.to(torch.bfloat16)


def _random(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    """Uniform, because unlike the normal it is computed the same bit for bit on every CPU.

    Matrices get a deviation of fan_in^-0.5, embeddings 1, so that activations keep their size;
    norm weights lie around 1, biases around 0.
    """
    unit: Tensor = torch.empty(spec.shape).uniform_(-1, 1, generator=generator)
    if spec.name == "model.embed_tokens.weight":
        return unit * math.sqrt(3)
    if len(spec.shape) == 2:
        return unit * math.sqrt(3 / spec.shape[1])
    return unit * 0.1 if spec.name.endswith("bias") else 1 + unit * 0.1


def _likelihood(tokenizer: Tokenizer) -> Tensor:
    """Factor on each token's logit [vocab]: 4 for printable ASCII, so that one token stands out,
    1 for other bytes, 0 for specials and unused ids: noise that is readable and does not stop."""
    factor = torch.zeros(CONFIG.vocab_size)
    for token in range(len(_SPECIALS), tokenizer.get_vocab_size()):
        text = tokenizer.decode([token])
        factor[token] = 4.0 if text.isascii() and (text.isprintable() or text == "\n") else 1.0
    return factor
