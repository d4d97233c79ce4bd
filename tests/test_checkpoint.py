"""Opening and reading checkpoints: what transformers and we write, and every way to be broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_model import random_tensors
from safetensors.torch import load_file, save_file
from small import SMALL

from dsa_hal.errors import CheckpointError, DsaHalError
from dsa_hal.model import checkpoint as checkpoint_module
from dsa_hal.model.checkpoint import Checkpoint
from dsa_hal.model.config import ModelConfig
from dsa_hal.model.schema import expected
from dsa_hal.model.shards import Entry, encode_header
from dsa_hal.ops.quant import quantize_fp8

MOE = "model.layers.1.mlp.experts."
Q_A = "model.layers.0.self_attn.q_a_proj.weight"
Tensors = dict[str, torch.Tensor]


def write(folder: Path, config: ModelConfig, tensors: Tensors | None = None) -> Tensors:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(random_tensors(config, 1)) if tensors is None else tensors
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return tensors


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, NaN codes included."""
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


@pytest.fixture(scope="module")
def oracle() -> Any:
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV32Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=2,
        q_lora_rank=48,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=24,
        v_head_dim=24,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=8,
        first_k_dense_replace=1,
        max_position_embeddings=1024,
    )
    model = DeepseekV32ForCausalLM(config)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.normal_()
    return model


@pytest.mark.parametrize(
    "options", [{}, {"max_shard_size": "40KB"}, {"save_original_format": False}], ids=str
)
def test_reads_what_transformers_writes(
    oracle: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    oracle.save_pretrained(tmp_path, **options)
    state = oracle.state_dict()
    with Checkpoint.open(tmp_path) as ckpt:
        assert ckpt.format == "hf" and ckpt.weights_dtype == "fp32"
        assert ckpt.notes() == [] and ckpt.ignored == () and ckpt.tokenizer_path is None
        stacks = {name for name in state if ".mlp.experts." in name}
        for name in state.keys() - stacks:
            assert torch.equal(ckpt.tensor(name), state[name]), name
        per_expert = {name for name in ckpt.names() if ".mlp.experts." in name}
        assert set(ckpt.names()) - per_expert == state.keys() - stacks
        for part in ("gate_up", "down"):
            stack = state[f"{MOE}{part}_proj"]
            got = list(ckpt.expert_stack(1, part))
            assert torch.equal(torch.stack([w for w, _ in got]), stack)
            assert all(scale is None for _, scale in got)
        assert torch.equal(
            ckpt.tensor(f"{MOE}5.up_proj.weight"), state[f"{MOE}gate_up_proj"][5, 32:]
        )


def test_fp8_linears_come_with_scales(tmp_path: Path) -> None:
    tensors = write(tmp_path, SMALL)
    ckpt = Checkpoint.open(tmp_path)
    assert ckpt.weights_dtype == "fp8"
    assert set(ckpt.names()) == set(tensors)
    for name, value in tensors.items():
        assert same(ckpt.tensor(name), value), name
    weight, scale = ckpt.linear("model.layers.0.self_attn.kv_a_proj_with_mqa")
    assert weight.shape == (192, 256) and scale is not None and scale.shape == (2, 2)
    for expert, (weight, scale) in enumerate(ckpt.expert_stack(1, "gate_up")):
        for half, which in enumerate(("gate_proj", "up_proj")):
            name = f"{MOE}{expert}.{which}.weight"
            assert same(weight[half * 128 : (half + 1) * 128], tensors[name])
            assert scale is not None and same(scale[half : half + 1], tensors[name + "_scale_inv"])
    # The scales belong to the weights: together they give back the random numbers.
    plain = dict(random_tensors(replace(SMALL, quant=None), 1))
    for name in (Q_A, "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"):
        weight, scale = ckpt.linear(name)
        rows, columns = weight.shape
        assert scale is not None
        wide = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        error = (weight.float() * wide - plain[name].float()).abs().max()
        assert error < plain[name].float().abs().max() / 14


def test_fused_fp8_experts(tmp_path: Path) -> None:
    split = dict(random_tensors(SMALL, 1))
    fused = {name: value for name, value in split.items() if MOE not in name}
    for suffix, tail in (("", "weight"), ("_scale_inv", "weight_scale_inv")):

        def stack(which: str, tail: str = tail) -> torch.Tensor:
            parts = [split[f"{MOE}{e}.{which}.{tail}"].view(torch.uint8) for e in range(4)]
            return torch.stack(parts)

        dtype = split[f"{MOE}0.up_proj.{tail}"].dtype
        gate_up = torch.cat([stack("gate_proj"), stack("up_proj")], dim=1)
        fused[f"{MOE}gate_up_proj{suffix}"] = gate_up.view(dtype)
        fused[f"{MOE}down_proj{suffix}"] = stack("down_proj").view(dtype)
    write(tmp_path, SMALL, fused)
    ckpt = Checkpoint.open(tmp_path)
    for name, value in split.items():
        assert same(ckpt.tensor(name), value), name


def test_tied_embeddings_and_byte_scales(tmp_path: Path) -> None:
    tied = replace(SMALL, tie_word_embeddings=True)
    tensors = dict(random_tensors(tied, 1))
    assert "lm_head.weight" not in tensors
    scale = Q_A + "_scale_inv"
    write(tmp_path, tied, tensors | {scale: tensors[scale].to(torch.float8_e8m0fnu)})
    ckpt = Checkpoint.open(tmp_path)
    assert same(ckpt.tensor("lm_head.weight"), tensors["model.embed_tokens.weight"])
    assert same(ckpt.tensor(scale), tensors[scale])


def test_mtp_layer_is_left_out_with_a_line(tmp_path: Path) -> None:
    extra = {
        "model.layers.2.eh_proj.weight": torch.zeros(2, 4),
        "model.layers.2.input_layernorm.weight": torch.zeros(2),
        "model.rotary.inv_freq": torch.zeros(2),
    }
    write(tmp_path, SMALL, dict(random_tensors(SMALL, 1)) | extra)
    ckpt = Checkpoint.open(tmp_path)
    assert len(ckpt.mtp) == 2 and ckpt.ignored == ("model.rotary.inv_freq",)
    assert ckpt.notes()[0].startswith("layer 2 is the multi-token prediction (MTP) module")
    assert "model.rotary.inv_freq" in ckpt.notes()[1]


def overlapping() -> bytes:
    """A file whose size is right, with two tensors in the same bytes."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(8)


def cut(path: Path, size: int) -> None:
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def edit(change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def edit_config(**change: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(data | change))

    return apply


def with_index(promise: dict[str, str], *, whole: bool = True) -> Callable[[Path], None]:
    """Cut the file in two shards under an index, then keep or drop the second."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names, files = sorted(tensors), ("a-1.safetensors", "a-2.safetensors")
        halves = {name: files[i % 2] for i, name in enumerate(names)}
        for file in files:
            save_file({n: tensors[n] for n in names if halves[n] == file}, folder / file)
        index = {"weight_map": halves | promise}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        if not whole:
            (folder / files[1]).unlink()

    return apply


NORM = "model.layers.1.input_layernorm.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json", "cannot be read")),
    "config no json": (lambda f: (f / "config.json").write_text("{"), ("not valid JSON",)),
    "config no object": (lambda f: (f / "config.json").write_text("[]"), ("a list", "object")),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ("no *.safetensors files",)),
    "only a prefix": (lambda f: cut(f / "model.safetensors", 5), ("5 bytes", "ends before")),
    "half a header": (lambda f: cut(f / "model.safetensors", 99), ("99 bytes", "ends before")),
    "truncated": (lambda f: cut(f / "model.safetensors", -1), ("truncated", "describes")),
    "trailing bytes": (
        lambda f: cut(f / "model.safetensors", (f / "model.safetensors").stat().st_size + 1),
        ("followed by unknown bytes",),
    ),
    "not safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x08" + b"\0" * 7 + b"x" * 8),
        ("damaged safetensors header",),
    ),
    "overlapping tensors": (
        lambda f: (f / "model.safetensors").write_bytes(overlapping()),
        ("damaged safetensors header", "overlap"),
    ),
    "wrong shape": (
        edit(lambda t: t.update({NORM: torch.ones(7)})),
        (NORM, "[7]", "[256]", "different models"),
    ),
    "wrong dtype": (
        edit(lambda t: t.update({NORM: torch.ones(256, dtype=torch.int32)})),
        (NORM, "I32", "BF16"),
    ),
    "fp8 where none may be": (
        edit(lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)})),
        (NORM, "F8_E4M3", "BF16"),
    ),
    "lacks a tensor": (
        edit(lambda t: (t.pop(NORM), t.pop(Q_A))),
        ("lacks tensor", Q_A, "and 1 more"),
    ),
    "lacks a scale": (edit(lambda t: t.pop(Q_A + "_scale_inv")), ("lacks tensor", Q_A + "_scale")),
    "wrong scale shape": (
        edit(lambda t: t.update({Q_A + "_scale_inv": torch.ones(1, 1)})),
        (Q_A + "_scale_inv", "[1, 1]", "[1, 2]"),
    ),
    "fp8 unannounced": (edit_config(quantization_config=None), ("FP8 weights", "quantisation")),
    "fewer layers stated": (
        edit_config(num_hidden_layers=1),
        ("model.layers.1.", "num_hidden_layers = 1", "no MTP module"),
    ),
    "other width stated": (edit_config(hidden_size=384), ("[64, 256]", "[64, 384]")),
    "unknown scoring": (edit_config(scoring_func="relu"), ("scoring_func", "'relu'", "config.js")),
    "missing shard": (with_index({}, whole=False), ("lacks 1 of the 2 shards", "a-2.safetensors")),
    "index promises more": (
        with_index({"model.ghost": "a-1.safetensors"}),
        ("a-1.safetensors", "lacks tensor model.ghost"),
    ),
    "two copies": (
        lambda f: (
            (f / "model.safetensors").rename(f / "x.safetensors")
            and (f / "y.safetensors").write_bytes((f / "x.safetensors").read_bytes())
        ),
        ("is in both", "x.safetensors", "y.safetensors"),
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write(folder, SMALL)
    return folder


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused_before_any_weight_is_read(
    case: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage, words = BROKEN[case]
    damage(tmp_path)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(checkpoint_module, "safe_open", forbidden)
    with pytest.raises(DsaHalError) as caught:
        Checkpoint.open(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message or "is in both" in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_two_shards_read_as_one(good: Path, tmp_path: Path) -> None:
    tensors = write(tmp_path, SMALL)
    with_index({})(tmp_path)
    with Checkpoint.open(tmp_path) as ckpt:
        assert all(same(ckpt.tensor(name), value) for name, value in tensors.items())


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; pass the folder"):
        Checkpoint.open(tmp_path / "deepseek-ai" / "DeepSeek-V3.2-Exp")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        Checkpoint.open(tmp_path / "file")


def test_closed_checkpoint_says_so(good: Path) -> None:
    with Checkpoint.open(good) as ckpt:
        kept = ckpt.tensor(NORM)
    assert kept.shape == (256,) and torch.isfinite(kept).all()
    with pytest.raises(CheckpointError, match="is closed"):
        ckpt.tensor(NORM)
    with pytest.raises(CheckpointError, match=r"holds no tensor model\.ghost"):
        Checkpoint.open(good).tensor("model.ghost")


@pytest.mark.parametrize(
    "name, at, value",
    [
        (NORM, (200,), float("nan")),
        ("model.embed_tokens.weight", (3, 17), float("-inf")),
        (Q_A, (5, 9), float("nan")),
        (Q_A + "_scale_inv", (0, 1), float("inf")),
        ("model.layers.1.mlp.gate.e_score_correction_bias", (2,), float("inf")),
    ],
)
def test_non_finite_values_are_found(
    good: Path, tmp_path: Path, name: str, at: tuple[int, ...], value: float
) -> None:
    seen: list[tuple[int, int]] = []
    with Checkpoint.open(good) as ckpt:
        ckpt.check_finite(lambda done, total: seen.append((done, total)))
        assert seen[-1] == (len(ckpt.names()), len(ckpt.names()))
    tensors = load_file(good / "model.safetensors")
    tensors[name] = tensors[name].clone()
    tensors[name][at] = torch.tensor(value).to(tensors[name].dtype)
    write(tmp_path, SMALL, tensors)
    with Checkpoint.open(tmp_path) as ckpt, pytest.raises(CheckpointError) as caught:
        ckpt.check_finite()
    for word in (f"tensor {name} holds {value}", str(list(at)), "model.safetensors"):
        assert word in str(caught.value)


def test_e4m3_nan_codes_of_either_sign_are_found(good: Path, tmp_path: Path) -> None:
    tensors = load_file(good / "model.safetensors")
    for code, finite in ((0x7F, False), (0xFF, False), (0x7E, True), (0x80, True)):
        raw = tensors[Q_A].clone().view(torch.uint8)
        raw[0, 0] = code
        write(tmp_path, SMALL, tensors | {Q_A: raw.view(torch.float8_e4m3fn)})
        with Checkpoint.open(tmp_path) as ckpt:
            if finite:
                ckpt.check_finite()
            else:
                with pytest.raises(CheckpointError, match=r"holds nan at \[0, 0\]"):
                    ckpt.check_finite()


MEMORY = """
import sys
from dsa_hal.model import checkpoint
from dsa_hal.model.checkpoint import Checkpoint

checkpoint._REMAP_BYTES = 32 << 20

def resident():
    rows = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return int(rows["VmRSS"].split()[0]) >> 10

before = resident()
ckpt = Checkpoint.open(sys.argv[1])
one = ckpt.tensor("model.norm.weight")
print(resident() - before)
peak = 0
for name in ckpt.names():
    ckpt.tensor(name).view(-1)[::1024].float().sum()
    peak = max(peak, resident() - before)
print(peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_opening_maps_and_never_holds_the_file(tmp_path: Path) -> None:
    large = replace(SMALL, num_hidden_layers=4, first_k_dense_replace=4, quant=None)
    large = replace(large, intermediate_size=1 << 14)
    entries = {spec.name: Entry("F32", spec.shape) for spec in expected(large).values()}
    size = sum(entry.nbytes for entry in entries.values())
    assert size > 190 << 20
    header = encode_header(entries, {})
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)  # sparse: zeros that occupy no disk
    (tmp_path / "config.json").write_text(json.dumps(large.to_hf()))
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True
    )
    opened, read_all = map(int, run.stdout.split())
    assert opened < 16
    assert read_all < 100


def test_block_scales_are_the_least_powers_of_two() -> None:
    weight = torch.zeros(130, 256)
    weight[0, 0], weight[0, 128], weight[129, 0] = 448.0, 449.0, -3.5
    values, scale = quantize_fp8.reference(weight, block_rows=128)
    assert scale.tolist() == [[1.0, 2.0], [2.0**-7, scale[1, 1].item()]]
    assert values[0, 0].float() == 448 and values[129, 0].float() == -448
