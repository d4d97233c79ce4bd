"""The configuration: both spellings, the constants that follow from it, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsa_hal.errors import ConfigError
from dsa_hal.model.config import ModelConfig, Quant, Rope

PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v32",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
DEMO: dict[str, Any] = {
    "vocab_size": 129280,
    "dim": 7168,
    "inter_dim": 18432,
    "moe_inter_dim": 2048,
    "n_layers": 61,
    "n_dense_layers": 3,
    "n_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_activated_experts": 8,
    "n_expert_groups": 8,
    "n_limited_groups": 4,
    "route_scale": 2.5,
    "score_func": "sigmoid",
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "dtype": "fp8",
    "scale_fmt": "ue8m0",
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
}


def test_published_constants() -> None:
    config = ModelConfig.from_hf(PUBLISHED)
    assert config.softmax_scale == pytest.approx(0.13523378, abs=1e-8)
    assert config.index_softmax_scale * 64**-0.5 == pytest.approx(0.01104854, abs=1e-8)
    assert config.rope_attention_factor == 1.0
    assert config.quant == Quant(pow2_scales=True)
    assert [config.is_moe(layer) for layer in (0, 2, 3, 60)] == [False, False, True, True]
    frequencies = config.rope_frequencies()
    plain = 10000.0 ** -(torch.arange(32, dtype=torch.float64) / 32)
    torch.testing.assert_close(frequencies[:11].double(), plain[:11], rtol=1e-6, atol=0)
    torch.testing.assert_close(frequencies[23:].double(), plain[23:] / 40, rtol=1e-6, atol=0)


def test_both_published_files_describe_one_model() -> None:
    hf = ModelConfig.from_hf(PUBLISHED)
    demo = ModelConfig.from_demo(DEMO)
    assert demo == replace(hf, bos_token_id=None, eos_token_ids=(), num_nextn_predict_layers=0)
    assert hf.to_demo() == DEMO
    assert ModelConfig.from_hf(json.loads(json.dumps(hf.to_hf()))) == hf


@pytest.mark.parametrize("max_seq_len, yarn", [(4096, False), (4097, True), (None, True)])
def test_demo_buffer_size_decides_yarn_only_where_stated(
    max_seq_len: int | None, yarn: bool
) -> None:
    data = DEMO if max_seq_len is None else DEMO | {"max_seq_len": max_seq_len}
    config = ModelConfig.from_demo(data)
    assert (config.rope.type == "yarn") is yarn
    assert config.softmax_scale == pytest.approx(0.13523378 if yarn else 192**-0.5, abs=1e-8)
    assert ModelConfig.from_demo(config.to_demo()) == config


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        {"factor": 16.0, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 20, "beta_slow": 2},
        {"factor": 8.0},
        {"factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0},
        {"factor": 4.0, "attention_factor": 1.5},
        {"factor": 4.0, "truncate": False},
        {"factor": 1.0, "original_max_position_embeddings": 163840},
    ],
)
def test_rope_agrees_with_transformers(rope: dict[str, Any]) -> None:
    from transformers import DeepseekV32Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as oracle

    given = {"rope_type": "yarn", "rope_theta": 50000.0} | rope
    if given["rope_type"] == "yarn":
        given.setdefault("original_max_position_embeddings", 4096)
    new = {k: v for k, v in PUBLISHED.items() if k not in ("rope_scaling", "rope_theta")}
    config = ModelConfig.from_hf(new | {"rope_parameters": given})
    theirs = DeepseekV32Config(rope_parameters=dict(given), max_position_embeddings=163840)
    rotary = oracle.DeepseekV32RotaryEmbedding
    inits = {"default": rotary.compute_default_rope_parameters} | ROPE_INIT_FUNCTIONS
    frequencies, factor = inits[str(given["rope_type"])](theirs)
    assert torch.equal(config.rope_frequencies(), frequencies)
    assert config.rope_attention_factor == pytest.approx(factor, abs=1e-12)
    scaling = oracle.yarn_apply_mscale(theirs.rope_parameters, 192**-0.5)  # type: ignore[no-untyped-call]
    assert config.softmax_scale == pytest.approx(scaling, abs=1e-12)
    again = ModelConfig.from_hf(config.to_hf())
    assert again == config


def test_transformers_reads_what_we_write() -> None:
    from transformers import DeepseekV32Config

    config = ModelConfig.from_hf(PUBLISHED)
    theirs = DeepseekV32Config.from_dict(config.to_hf())
    again = ModelConfig.from_hf(theirs.to_dict() | {"quantization_config": None})
    # transformers drops the fields it has one rule for, and the MTP count.
    assert again == replace(config, quant=None, num_nextn_predict_layers=1)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"scoring_func": "relu"}, ("scoring_func", "'relu'", "'sigmoid'", "'softmax'")),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ("rope_type", "'linear'", "'yarn'")),
        ({"rope_scaling": {"type": "yarn"}}, ("factor", "missing")),
        ({"rope_scaling": "yarn"}, ("rope_parameters", "'yarn'", "object")),
        ({"hidden_act": "gelu"}, ("hidden_act", "'gelu'", "'silu'")),
        ({"topk_method": "greedy"}, ("topk_method", "'greedy'", "'noaux_tc'")),
        ({"model_type": "llama"}, ("model_type", "'llama'", "'deepseek_v32'")),
        ({"attention_bias": True}, ("attention_bias", "True", "False")),
        ({"norm_topk_prob": 1}, ("norm_topk_prob", "1", "True")),
        ({"quantization_config": {"quant_method": "awq"}}, ("quant_method", "'awq'", "'fp8'")),
        ({"hidden_size": 0}, ("hidden_size", "0", "at least 1")),
        ({"hidden_size": 7168.0}, ("hidden_size", "7168.0", "integer")),
        ({"vocab_size": True}, ("vocab_size", "True", "integer")),
        ({"q_lora_rank": None}, ("q_lora_rank", "None", "integer")),
        ({"rms_norm_eps": float("nan")}, ("rms_norm_eps", "nan", "finite")),
        ({"eos_token_id": "</s>"}, ("eos_token_id", "'</s>'", "token id")),
        ({"n_group": 7}, ("n_routed_experts = 256", "n_group = 7", "evenly")),
        ({"n_group": 256}, ("n_group = 256", "1 expert", "best two")),
        ({"topk_group": 9}, ("topk_group is 9", "n_group = 8")),
        ({"num_experts_per_tok": 129}, ("num_experts_per_tok is 129", "128 experts")),
        ({"index_head_dim": 96}, ("index_head_dim is 96", "power of two")),
        ({"index_head_dim": 32}, ("index_head_dim is 32", "qk_rope_head_dim = 64")),
        ({"qk_rope_head_dim": 63}, ("qk_rope_head_dim is 63", "even")),
        ({"mlp_layer_types": ["dense"]}, ("mlp_layer_types", "['dense']", "61")),
        ({"mlp_layer_types": "dense"}, ("mlp_layer_types", "'dense'", "list")),
        ({"moe_intermediate_size": 2000}, ("moe_intermediate_size is 2000", "multiple of 128")),
    ],
)
def test_refusals_name_field_value_and_remedy(
    change: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_hf(PUBLISHED | change, "some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json")
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "name, value, known",
    [
        ("fmt", "e5m2", "'e4m3'"),
        ("weight_block_size", [64, 64], "[128, 128]"),
        ("weight_block_size", None, "[128, 128]"),
        ("scale_fmt", "e4m3", "'ue8m0'"),
        ("activation_scheme", "static", "'dynamic'"),
    ],
)
def test_unknown_quantisation_is_refused(name: str, value: object, known: str) -> None:
    quant = PUBLISHED["quantization_config"] | {name: value}
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_hf(PUBLISHED | {"quantization_config": quant})
    for word in (name, repr(value), known):
        assert word in str(caught.value)


@pytest.mark.parametrize("scale_fmt, pow2", [(None, False), ("float", False), ("ue8m0", True)])
def test_scale_format(scale_fmt: str | None, pow2: bool) -> None:
    quant = PUBLISHED["quantization_config"] | {"scale_fmt": scale_fmt}
    config = ModelConfig.from_hf(PUBLISHED | {"quantization_config": quant})
    assert config.quant == Quant(pow2_scales=pow2)


@pytest.mark.parametrize("name", ["kv_lora_rank", "index_topk", "routed_scaling_factor"])
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"required field {name} is missing"):
        ModelConfig.from_hf({k: v for k, v in PUBLISHED.items() if k != name})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rms_norm_eps": 1e-5}, ("rms_norm_eps is 1e-05", "1e-06")),
        ({"norm_topk_prob": False}, ("norm_topk_prob is False", "True")),
        ({"rope": Rope("yarn", factor=4.0, mscale=1.0)}, ("cos and sin", "1.0")),
        ({"tie_word_embeddings": True}, ("tie_word_embeddings is True",)),
        ({"moe_layer_freq": 2}, ("moe_layer_freq is 2", "1")),
        ({"mlp_layer_types": ("sparse",) * 61}, ("mlp_layer_types",)),
    ],
)
def test_what_the_demo_cannot_say_is_refused(
    change: dict[str, Any], words: tuple[str, ...]
) -> None:
    config = replace(ModelConfig.from_hf(PUBLISHED), **change)
    with pytest.raises(ConfigError) as caught:
        config.to_demo()
    for word in words:
        assert word in str(caught.value)
