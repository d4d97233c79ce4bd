"""The model's configuration: one frozen object, read from either published spelling.

Field names are Hugging Face's. A file that says something this project does not know is refused
here, by name and value, so that no later code has to guess.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dsa_hal.errors import ConfigError
from dsa_hal.model.fields import Fields

MODEL_TYPE = "deepseek_v32"
PUBLISHED_CONTEXT = 163840
BLOCK = 128

# Sizes that both spellings state: Hugging Face's name, the demo's, the demo's default, the least.
_SIZES = (
    ("vocab_size", "vocab_size", 102400, 1),
    ("hidden_size", "dim", 2048, 1),
    ("intermediate_size", "inter_dim", 10944, 1),
    ("moe_intermediate_size", "moe_inter_dim", 1408, 1),
    ("num_hidden_layers", "n_layers", 27, 1),
    ("first_k_dense_replace", "n_dense_layers", 1, 0),
    ("num_attention_heads", "n_heads", 16, 1),
    ("n_routed_experts", "n_routed_experts", 64, 1),
    ("n_shared_experts", "n_shared_experts", 2, 1),
    ("num_experts_per_tok", "n_activated_experts", 6, 1),
    ("n_group", "n_expert_groups", 1, 1),
    ("topk_group", "n_limited_groups", 1, 1),
    ("q_lora_rank", "q_lora_rank", 0, 1),
    ("kv_lora_rank", "kv_lora_rank", 512, 1),
    ("qk_nope_head_dim", "qk_nope_head_dim", 128, 1),
    ("qk_rope_head_dim", "qk_rope_head_dim", 64, 1),
    ("v_head_dim", "v_head_dim", 128, 1),
    ("index_n_heads", "index_n_heads", 64, 1),
    ("index_head_dim", "index_head_dim", 128, 1),
    ("index_topk", "index_topk", 2048, 1),
)
# YaRN's numbers: Hugging Face's name, the demo's name, the demo's default.
_YARN = (
    ("factor", "rope_factor", 40.0),
    ("beta_fast", "beta_fast", 32.0),
    ("beta_slow", "beta_slow", 1.0),
)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding parameters; everything after `theta` matters for type "yarn" alone.

    `attention_factor` multiplies cos and sin; None derives it from the two mscales, as
    transformers does. `truncate` rounds the ramp's bounds to whole dimensions.
    """

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class Quant:
    """FP8 weights: e4m3 values with one fp32 dequantisation scale per 128x128 block.

    `pow2_scales`: activations are quantised with power-of-two scales (`scale_fmt` "ue8m0").
    """

    fmt: str = "e4m3"
    block: tuple[int, int] = (BLOCK, BLOCK)
    pow2_scales: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V3.2 model's sizes and rules. Lengths count tokens, widths count elements.

    `mlp_layer_types` holds "dense" or "sparse" per layer where that does not follow from
    `first_k_dense_replace` and `moe_layer_freq`, else nothing; ask `is_moe`. Numbers that
    contradict each other raise ConfigError.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    num_attention_heads: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    max_position_embeddings: int = PUBLISHED_CONTEXT
    rope: Rope = Rope()
    routed_scaling_factor: float = 1.0
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    moe_layer_freq: int = 1
    mlp_layer_types: tuple[str, ...] = ()
    indexer_rope_interleave: bool = False
    rms_norm_eps: float = 1e-6
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    num_nextn_predict_layers: int = 0
    tie_word_embeddings: bool = False
    quant: Quant | None = None

    def __post_init__(self) -> None:
        if self.mlp_layer_types == self._derived_layer_types():
            object.__setattr__(self, "mlp_layer_types", ())
        for problem in _contradictions(self):
            raise ConfigError(problem)

    def _derived_layer_types(self) -> tuple[str, ...]:
        first, every = self.first_k_dense_replace, self.moe_layer_freq
        layers = range(self.num_hidden_layers)
        return tuple("sparse" if i >= first and i % every == 0 else "dense" for i in layers)

    def is_moe(self, layer: int) -> bool:
        return (self.mlp_layer_types or self._derived_layer_types())[layer] == "sparse"

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head, [nope | rope]."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def shared_intermediate_size(self) -> int:
        return self.n_shared_experts * self.moe_intermediate_size

    @property
    def softmax_scale(self) -> float:
        """Factor on attention scores: qk_head_dim^-0.5, times m^2 under YaRN with
        `mscale_all_dim` (0.13523 for the published model; never 576^-0.5)."""
        scale = float(self.qk_head_dim**-0.5)
        if self.rope.type == "yarn" and self.rope.mscale_all_dim:
            scale *= _mscale(self.rope.factor, self.rope.mscale_all_dim) ** 2
        return scale

    @property
    def index_softmax_scale(self) -> float:
        """Factor on the indexer's dot products: index_head_dim^-0.5. Its head weights carry
        another index_n_heads^-0.5; each is applied exactly once."""
        return float(self.index_head_dim**-0.5)

    @property
    def rope_attention_factor(self) -> float:
        """Factor on cos and sin: 1 when the two mscales are equal, as published."""
        rope = self.rope
        if rope.type == "default":
            return 1.0
        if rope.attention_factor is not None:
            return rope.attention_factor
        if rope.mscale and rope.mscale_all_dim:
            return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
        return _mscale(rope.factor, 1.0)

    def rope_frequencies(self) -> torch.Tensor:
        """Radians per position of each rotated pair, fp32 [qk_rope_head_dim / 2], on the CPU.

        YaRN, as in the model's demo code and transformers: pairs that turn more than `beta_fast`
        times within the original context keep their frequency, pairs that turn less than
        `beta_slow` times are slowed by `factor`, and a linear ramp joins the two.
        """
        dim, rope = self.qk_rope_head_dim, self.rope
        period = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        if rope.type == "default":
            return 1.0 / period

        def pair_that_turns(times: float) -> float:
            wavelength = rope.original_max_position_embeddings / (times * 2 * math.pi)
            return dim * math.log(wavelength) / (2 * math.log(rope.theta))

        low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001
        pairs = torch.arange(dim // 2, dtype=torch.float32)
        kept = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
        return (1.0 / (rope.factor * period)) * (1 - kept) + (1.0 / period) * kept

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Read Hugging Face's `config.json`, in the published spelling (`rope_scaling` beside
        `rope_theta`) or transformers 5's (`rope_parameters`).

        Fields that are not read here are ignored. `source` is the file named in errors;
        ConfigError names the field, the value found and the values known.
        """
        f = Fields(data, source)
        f.choice("model_type", (MODEL_TYPE,))
        f.choice("hidden_act", ("silu",), "silu")
        f.choice("attention_bias", (False,), False)
        f.choice("mlp_bias", (False,), False)
        sizes: dict[str, Any] = {hf: f.integer(hf, least) for hf, _, _, least in _SIZES}
        context = f.integer("max_position_embeddings", 1)
        return _consistent(
            f,
            **sizes,
            max_position_embeddings=context,
            rope=_hf_rope(f, context),
            routed_scaling_factor=f.number("routed_scaling_factor"),
            scoring_func=f.choice("scoring_func", ("sigmoid", "softmax"), "sigmoid"),
            topk_method=f.choice("topk_method", ("noaux_tc",), "noaux_tc"),
            norm_topk_prob=f.choice("norm_topk_prob", (True, False), True),
            moe_layer_freq=f.integer("moe_layer_freq", 1, 1),
            mlp_layer_types=f.strings("mlp_layer_types"),
            indexer_rope_interleave=f.choice("indexer_rope_interleave", (False, True), False),
            rms_norm_eps=f.number("rms_norm_eps"),
            bos_token_id=next(iter(f.token_ids("bos_token_id")), None),
            eos_token_ids=f.token_ids("eos_token_id"),
            num_nextn_predict_layers=f.integer("num_nextn_predict_layers", 0, 0),
            tie_word_embeddings=f.choice("tie_word_embeddings", (False, True), False),
            quant=_hf_quant(f),
        )

    @classmethod
    def from_demo(cls, data: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Read the demo's JSON (`config_671B_v3.2.json` over its `ModelArgs` defaults).

        The demo applies YaRN and its m^2 softmax factor only when `max_seq_len`, the size of its
        buffers, exceeds `original_seq_len`. Here the model is meant, not a buffer: a file that
        does not state `max_seq_len` gets the published context of 163840 tokens, so YaRN is on.
        The demo takes special tokens from the tokenizer, so bos and eos stay unset.
        """
        f = Fields(data, source)
        sizes: dict[str, Any] = {
            hf: f.integer(demo, least, default) for hf, demo, default, least in _SIZES
        }
        scoring = f.choice("score_func", ("softmax", "sigmoid"), "softmax")
        pow2_scales = f.choice("scale_fmt", (None, "ue8m0"), None) is not None
        fp8 = f.choice("dtype", ("bf16", "fp8"), "bf16") == "fp8"
        context = f.integer("max_seq_len", 1, PUBLISHED_CONTEXT)
        original = f.integer("original_seq_len", 1, 4096)
        theta = f.number("rope_theta", 10000.0)
        yarn: dict[str, Any] = {}
        if context > original:
            yarn = {hf: f.number(demo, default) for hf, demo, default in _YARN}
            yarn["type"], yarn["original_max_position_embeddings"] = "yarn", original
            yarn["mscale"] = yarn["mscale_all_dim"] = f.number("mscale", 1.0)
        return _consistent(
            f,
            **sizes,
            max_position_embeddings=context,
            rope=Rope(theta=theta, **yarn),
            routed_scaling_factor=f.number("route_scale", 1.0),
            scoring_func=scoring,
            norm_topk_prob=scoring == "sigmoid",
            quant=Quant(pow2_scales=pow2_scales) if fp8 else None,
        )

    def to_hf(self) -> dict[str, Any]:
        """The published `config.json` spelling, which transformers 4 and 5 both read."""
        out = asdict(self)
        rope, quant, eos = out.pop("rope"), out.pop("quant"), out.pop("eos_token_ids")
        out["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
        out["mlp_layer_types"] = list(self.mlp_layer_types) or None
        out |= {
            "architectures": ["DeepseekV32ForCausalLM"],
            "attention_bias": False,
            "hidden_act": "silu",
            "model_type": MODEL_TYPE,
            "num_key_value_heads": self.num_attention_heads,
            "rope_theta": rope.pop("theta"),
            "rope_scaling": None,
        }
        if self.rope.type == "yarn":
            if self.rope.truncate:
                del rope["truncate"]
            out["rope_scaling"] = {name: v for name, v in rope.items() if v is not None}
        if self.quant is not None:
            out["quantization_config"] = {
                "activation_scheme": "dynamic",
                "fmt": quant["fmt"],
                "quant_method": "fp8",
                "weight_block_size": list(quant["block"]),
            }
            if self.quant.pow2_scales:
                out["quantization_config"]["scale_fmt"] = "ue8m0"
        return dict(sorted(out.items()))

    def to_demo(self) -> dict[str, Any]:
        """The demo's JSON: the published file's keys, then those whose value is not the default.

        It holds only what the demo's `ModelArgs` accepts. ConfigError when the model follows a
        rule that the demo's code cannot be told.
        """
        rope, context = self.rope, self.max_position_embeddings
        for problem in _beyond_demo(self):
            raise ConfigError(f"{problem}; keep this model in the Hugging Face format")
        out: dict[str, Any] = {demo: getattr(self, hf) for hf, demo, *_ in _SIZES}
        out["route_scale"], out["score_func"] = self.routed_scaling_factor, self.scoring_func
        out["dtype"] = "bf16" if self.quant is None else "fp8"
        if self.quant is not None and self.quant.pow2_scales:
            out["scale_fmt"] = "ue8m0"
        optional: list[tuple[str, Any, Any]] = [
            ("max_seq_len", context, PUBLISHED_CONTEXT),
            ("rope_theta", rope.theta, 10000.0),
        ]
        if rope.type == "yarn":
            original = rope.original_max_position_embeddings
            optional.append(("original_seq_len", original, 4096))
            optional.append(("mscale", rope.mscale_all_dim, 1.0))
            optional += [(demo, getattr(rope, hf), default) for hf, demo, default in _YARN]
        else:
            # The demo leaves YaRN out only while its buffers fit the original context.
            optional.append(("original_seq_len", context, 4096))
        return out | {name: value for name, value, default in optional if value != default}


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _consistent(f: Fields, **kwargs: Any) -> ModelConfig:
    try:
        return ModelConfig(**kwargs)
    except ConfigError as error:
        f.refuse(str(error))


def _hf_rope(f: Fields, context: int) -> Rope:
    raw = f.get("rope_parameters", None) or f.get("rope_scaling", None) or {}
    if not isinstance(raw, Mapping):
        f.refuse(f"rope_parameters is {raw!r}; it must be an object")
    values = {"rope_theta": f.get("rope_theta", None) or 10000.0} | {
        name: value for name, value in raw.items() if value is not None
    }
    values.setdefault("rope_type", values.get("type", "default"))
    r = Fields(values, f.source)
    theta = r.number("rope_theta")
    if r.choice("rope_type", ("default", "yarn"), "default") == "default":
        return Rope(theta=theta)
    # transformers reads an mscale of 0 as absent, but takes attention_factor at its word.
    optional = [name for name in ("mscale", "mscale_all_dim") if values.get(name)]
    optional += ["attention_factor"] if "attention_factor" in values else []
    return Rope(
        type="yarn",
        theta=theta,
        factor=r.number("factor"),
        original_max_position_embeddings=r.integer("original_max_position_embeddings", 1, context),
        beta_fast=r.number("beta_fast", 32.0),
        beta_slow=r.number("beta_slow", 1.0),
        truncate=r.choice("truncate", (True, False), True),
        **{name: r.number(name) for name in optional},
    )


def _hf_quant(f: Fields) -> Quant | None:
    raw = f.get("quantization_config", None)
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        f.refuse(f"quantization_config is {raw!r}; it must be an object or null")
    q = Fields(raw, f"{f.source}, quantization_config")
    q.choice("quant_method", ("fp8",))
    q.choice("activation_scheme", ("dynamic",), "dynamic")
    q.choice("expert_dtype", ("fp8",), "fp8")
    # transformers writes "float" where the published files leave the field out.
    scale_fmt = q.choice("scale_fmt", (None, "float", "ue8m0"), None)
    q.choice("weight_block_size", ([BLOCK, BLOCK],))
    return Quant(fmt=q.choice("fmt", ("e4m3",), "e4m3"), pow2_scales=scale_fmt == "ue8m0")


def _contradictions(c: ModelConfig) -> Iterator[str]:
    """Sentences about numbers that cannot hold together."""
    unknown = set(c.mlp_layer_types) - {"dense", "sparse"}
    if unknown or len(c.mlp_layer_types) not in (0, c.num_hidden_layers):
        yield (
            f"mlp_layer_types is {list(c.mlp_layer_types)!r}; it must hold 'dense' or 'sparse' "
            f"for each of the num_hidden_layers = {c.num_hidden_layers} layers"
        )
    groups = f"n_routed_experts = {c.n_routed_experts} in n_group = {c.n_group} groups"
    if c.n_routed_experts % c.n_group:
        yield f"{groups} does not divide evenly"
    group = c.n_routed_experts // c.n_group
    if group < 2:
        yield f"{groups} leaves {group} expert a group, but routing scores a group by its best two"
    if c.topk_group > c.n_group:
        yield f"topk_group is {c.topk_group}, more than n_group = {c.n_group}"
    if c.num_experts_per_tok > c.topk_group * group:
        yield (
            f"num_experts_per_tok is {c.num_experts_per_tok}, but topk_group = {c.topk_group} "
            f"groups of {group} hold only {c.topk_group * group} experts"
        )
    if c.qk_rope_head_dim % 2:
        yield f"qk_rope_head_dim is {c.qk_rope_head_dim}; rotation needs an even number"
    if c.index_head_dim & (c.index_head_dim - 1):
        yield f"index_head_dim is {c.index_head_dim}; its Hadamard rotation needs a power of two"
    if c.index_head_dim < c.qk_rope_head_dim:
        yield (
            f"index_head_dim is {c.index_head_dim}, but its first qk_rope_head_dim = "
            f"{c.qk_rope_head_dim} elements are rotated"
        )
    if c.rope.type == "yarn" and c.rope.factor < 1:
        yield f"rope factor is {c.rope.factor}; YaRN needs at least 1"
    if c.rope.type == "yarn" and (c.rope.theta <= 1 or c.rope.beta_fast < c.rope.beta_slow):
        yield (
            f"rope theta, beta_fast, beta_slow are {c.rope.theta}, {c.rope.beta_fast}, "
            f"{c.rope.beta_slow}; YaRN needs theta above 1 and beta_fast of at least beta_slow"
        )
    if c.quant is not None:
        yield from _unquantisable(c)


def _unquantisable(c: ModelConfig) -> Iterator[str]:
    """FP8 products scale their inputs in groups of 128, so inner sizes must be multiples of it."""
    inner = {
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "moe_intermediate_size": c.moe_intermediate_size,
        "q_lora_rank": c.q_lora_rank,
        "kv_lora_rank": c.kv_lora_rank,
        "num_attention_heads * v_head_dim": c.num_attention_heads * c.v_head_dim,
    }
    for name, value in inner.items():
        if value % BLOCK:
            yield f"{name} is {value}; FP8 weights need a multiple of {BLOCK}"


def _beyond_demo(c: ModelConfig) -> Iterator[str]:
    """Sentences about what the demo's JSON cannot express."""
    fixed: list[tuple[str, Any, Any]] = [
        ("rms_norm_eps", c.rms_norm_eps, 1e-6),
        ("tie_word_embeddings", c.tie_word_embeddings, False),
        ("indexer_rope_interleave", c.indexer_rope_interleave, False),
        ("norm_topk_prob", c.norm_topk_prob, c.scoring_func == "sigmoid"),
        ("mlp_layer_types", c.mlp_layer_types, ()),
        ("moe_layer_freq", c.moe_layer_freq, 1),
    ]
    if c.rope.type == "yarn":
        longer = c.max_position_embeddings > c.rope.original_max_position_embeddings
        fixed += [
            ("the factor on cos and sin", c.rope_attention_factor, 1.0),
            ("whether rope mscale_all_dim is set", bool(c.rope.mscale_all_dim), True),
            ("rope truncate", c.rope.truncate, True),
            ("whether the context exceeds YaRN's original one", longer, True),
        ]
    for name, value, only in fixed:
        if value != only:
            yield f"{name} is {value!r}, but the demo's format can only mean {only!r}"
