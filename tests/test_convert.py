"""Conversion to the demo's format: same bytes under the demo's names, and nothing torn."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_model import random_checkpoint, random_tensors
from safetensors.torch import load_file, save_file
from small import SMALL

from dsa_hal.errors import CheckpointError, DsaHalError
from dsa_hal.model import shards
from dsa_hal.model.checkpoint import Checkpoint
from dsa_hal.model.config import ModelConfig
from dsa_hal.model.convert import convert

# Small, but cut like the published model: every cut axis leaves whole 128-blocks to two ranks,
# and kv_a_proj has 128 + 64 = 192 rows, one and a half blocks.
CUT = replace(
    SMALL,
    num_attention_heads=4,
    n_shared_experts=2,
    rope=replace(SMALL.rope, mscale=1.0, mscale_all_dim=1.0),
    eos_token_ids=(),
)
MTP = {"model.layers.2.eh_proj.weight": torch.zeros(4, 4)}


def write(folder: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    folder.mkdir()
    tensors = dict(random_tensors(config, 1))
    save_file(tensors | MTP, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    return tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert") / "source"
    write(folder, CUT)
    return folder


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def demo_parts(name: str, value: torch.Tensor, ranks: int) -> tuple[str, list[torch.Tensor | None]]:
    """What the demo's own script does with one tensor, told by substrings as that script does."""
    name = name.removeprefix("model.").replace("self_attn", "attn").replace("mlp", "ffn")
    name = name.replace("weight_scale_inv", "scale").replace("e_score_correction_bias", "bias")
    table = {
        "embed_tokens": ("embed", 0),
        "input_layernorm": ("attn_norm", None),
        "post_attention_layernorm": ("ffn_norm", None),
        "q_a_proj": ("wq_a", None),
        "q_a_layernorm": ("q_norm", None),
        "q_b_proj": ("wq_b", 0),
        "kv_a_proj_with_mqa": ("wkv_a", None),
        "kv_a_layernorm": ("kv_norm", None),
        "kv_b_proj": ("wkv_b", 0),
        "o_proj": ("wo", 1),
        "gate_proj": ("w1", 0),
        "down_proj": ("w2", 1),
        "up_proj": ("w3", 0),
        "lm_head": ("head", 0),
    }
    key = name.split(".")[-2]
    renamed, dim = table.get(key, (key, None))
    name = name.replace(key, renamed)
    expert = re.search(r"\.experts\.(\d+)\.", name)
    if expert:
        owner = int(expert[1]) // (4 // ranks)
        return name, [value if rank == owner else None for rank in range(ranks)]
    if dim is None:
        return name, [value] * ranks
    return name, list(value.chunk(ranks, dim))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def test_every_tensor_arrives_under_the_demos_name(tmp_path: Path, ranks: int, fp8: bool) -> None:
    config = CUT if fp8 else replace(CUT, quant=None)
    tensors = write(tmp_path / "hf", config)
    seen: list[tuple[int, int]] = []
    files = convert(tmp_path / "hf", tmp_path / "demo", 4, ranks, lambda d, t: seen.append((d, t)))
    assert [f.name for f in files] == [f"model{r}-mp{ranks}.safetensors" for r in range(ranks)]
    expected: list[dict[str, torch.Tensor]] = [{} for _ in files]
    for name, value in tensors.items():
        renamed, parts = demo_parts(name, value, ranks)
        for held, part in zip(expected, parts, strict=True):
            if part is not None:
                held[renamed] = part
    for file, want in zip(files, expected, strict=True):
        got = load_file(file)
        assert got.keys() == want.keys()
        for name in want:
            assert got[name].dtype == want[name].dtype, name
            assert torch.equal(raw(got[name]), raw(want[name])), name
    total = sum(file.stat().st_size for file in files)
    assert seen == sorted(seen) and seen[-1] == (total, total)
    others = {path.name for path in (tmp_path / "demo").iterdir()} - {f.name for f in files}
    assert others == {"config.json", "tokenizer.json", "generation_config.json"}

    with Checkpoint.open(tmp_path / "demo") as demo:
        assert demo.format == "demo" and demo.weights_dtype == ("fp8" if fp8 else "bf16")
        assert demo.config == replace(config, num_nextn_predict_layers=0)
        assert set(demo.names()) == set(tensors)
        for name, value in tensors.items():
            assert torch.equal(raw(demo.tensor(name)), raw(value)), name
        latent, scale = demo.linear("model.layers.0.self_attn.kv_a_proj_with_mqa")
        assert latent.shape == (192, 256)
        assert (scale is not None and scale.shape == (2, 2)) is fp8
        stacks = [
            demo.expert_stack(1, "down"),
            Checkpoint.open(tmp_path / "hf").expert_stack(1, "down"),
        ]
        for (ours, _), (theirs, _) in zip(*stacks, strict=True):
            assert torch.equal(raw(ours), raw(theirs))


def test_fp8_model_converts(tmp_path: Path) -> None:
    hf = random_checkpoint(tmp_path / "hf")
    convert(hf, tmp_path / "demo", 16, 1)
    with Checkpoint.open(tmp_path / "demo") as demo, Checkpoint.open(hf) as original:
        assert demo.config.softmax_scale == original.config.softmax_scale
        assert all(torch.equal(raw(demo.tensor(n)), raw(original.tensor(n))) for n in demo.names())


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: (f / "model1-mp2.safetensors").unlink(), ("lacks model1-mp2", "2 rank files")),
        (lambda f: os.truncate(f / "model1-mp2.safetensors", 999), ("model1-mp2", "999 bytes")),
        (lambda f: (f / "config.json").unlink(), ("needs one JSON", "found none")),
        (
            lambda f: shutil.copy(f / "model0-mp2.safetensors", f / "model0-mp1.safetensors"),
            ("mp [1, 2]",),
        ),
        (
            lambda f: shutil.copy(f / "model0-mp2.safetensors", f / "model1-mp2.safetensors"),
            ("lacks tensor layers.1.ffn.experts.2.w1.weight",),
        ),
    ],
)
def test_broken_demo_folders_are_refused(
    source: Path, tmp_path: Path, change: Callable[[Path], object], words: tuple[str, ...]
) -> None:
    convert(source, tmp_path / "demo", 4, 2)
    change(tmp_path / "demo")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path / "demo")
    assert str(tmp_path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_demo_config_is_found_by_its_fields(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "demo", 4, 1)
    (tmp_path / "demo" / "config.json").rename(tmp_path / "demo" / "mine.json")
    (tmp_path / "demo" / "added_tokens.json").write_text("[]")
    assert Checkpoint.open(tmp_path / "demo").format == "demo"


@pytest.mark.parametrize(
    "experts, ranks, words",
    [
        (8, 1, ("n_experts is 8", "has 4 routed experts")),
        (4, 3, ("model_parallel is 3", "divide the 4 experts")),
        (4, 0, ("model_parallel is 0", "at least 1")),
        (4, 4, ("model_parallel 4", "128-wide FP8 scale blocks")),
    ],
)
def test_cuts_that_do_not_divide_write_nothing(
    source: Path, tmp_path: Path, experts: int, ranks: int, words: tuple[str, ...]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "demo", experts, ranks)
    assert all(word in str(caught.value) for word in words)
    assert not (tmp_path / "demo").exists()


def test_what_the_demo_cannot_say_writes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "hf", replace(CUT, rms_norm_eps=1e-5))
    with pytest.raises(DsaHalError, match="rms_norm_eps is 1e-05"):
        convert(tmp_path / "hf", tmp_path / "demo", 4, 1)
    assert not (tmp_path / "demo").exists()


def test_other_checkpoints_are_not_overwritten(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    with pytest.raises(CheckpointError, match="is the source itself"):
        convert(copy, copy, 4, 1)
    other = tmp_path / "other"
    shutil.copytree(source, other)
    with pytest.raises(CheckpointError, match=r"model\.safetensors belongs to another checkpoint"):
        convert(copy, other, 4, 1)
    made = tmp_path / "made"
    convert(copy, made, 4, 2)
    with pytest.raises(CheckpointError, match="belongs to another checkpoint or another state"):
        convert(copy, made, 4, 1)
    os.utime(copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="another state of this one"):
        convert(copy, made, 4, 2)
    with pytest.raises(CheckpointError, match="demo's format already"):
        convert(made, tmp_path / "again", 4, 1)


def test_too_small_a_disk_is_noticed_before_writing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 4321))
    with pytest.raises(CheckpointError, match="but 4321 are free on its disk"):
        convert(source, tmp_path / "deep" / "demo", 4, 1)
    assert not (tmp_path / "deep").exists()


def test_a_failing_write_leaves_the_finished_file_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills within the second rank's file: the first stays, the second leaves nothing,
    and the next run makes the rest."""
    opened: list[Path] = []
    real = os.fsync

    def full(handle: int) -> None:
        opened.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        if "model1" in opened[-1].name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    save = tmp_path / "demo"
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError) as caught:
        convert(source, save, 4, 2)
    for word in ("model1-mp2.safetensors", "No space left", "needs", "are free"):
        assert word in str(caught.value)
    assert [path.name for path in save.iterdir()] == ["model0-mp2.safetensors"]
    monkeypatch.undo()
    first = (save / "model0-mp2.safetensors").stat()
    convert(source, save, 4, 2)
    assert (save / "model0-mp2.safetensors").stat().st_ino == first.st_ino
    Checkpoint.open(save).check_finite()


RUN = """
import os, resource, signal, sys
from dsa_hal.errors import CheckpointError
from dsa_hal.model.convert import convert

source, save, how = sys.argv[1:]
def progress(done, total):
    if how == "kill" and done > 0.8 * total:
        os.kill(os.getpid(), signal.SIGKILL)
if how == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    convert(source, save, 4, 2, progress)
except CheckpointError as error:
    sys.exit(f"refused: {error}")
"""


def run(source: Path, save: Path, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, str(source), str(save), how]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_file_size_limit_is_one_sentence(source: Path, tmp_path: Path) -> None:
    done = run(source, tmp_path / "demo", "limit")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "model0-mp2.safetensors could not be written (File too large)" in done.stderr
    assert list((tmp_path / "demo").iterdir()) == []


def test_a_killed_run_is_resumed(source: Path, tmp_path: Path) -> None:
    save = tmp_path / "demo"
    assert run(source, save, "kill").returncode == -signal.SIGKILL
    names = sorted(path.name for path in save.iterdir())
    assert names == [".model1-mp2.safetensors.partial", "model0-mp2.safetensors"]
    with pytest.raises(CheckpointError, match="lacks model1-mp2"):
        Checkpoint.open(save)
    first = (save / "model0-mp2.safetensors").stat()
    seen: list[int] = []
    convert(source, save, 4, 2, lambda done, total: seen.append(done))
    assert (save / "model0-mp2.safetensors").stat().st_ino == first.st_ino
    assert seen[0] == first.st_size
    assert not list(save.glob(".*"))
    Checkpoint.open(save).check_finite()
    again: list[int] = []
    convert(source, save, 4, 2, lambda done, total: again.append(done))
    assert len(again) == 2


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with shards.atomic_file(target, 3) as first:
        shards.write_all(first, b"one")
        with (
            pytest.raises(CheckpointError, match="being written by another process"),
            shards.atomic_file(target, 3),
        ):
            pass
    assert target.read_bytes() == b"one" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_really_full_disk(source: Path, tmp_path: Path) -> None:
    """Something else fills the disk while the first file is written; freed, the run goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    ballast = disk / "ballast"

    def fill(done: int, total: int) -> None:
        if not ballast.exists():
            ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 8192))

    try:
        with pytest.raises(CheckpointError) as caught:
            convert(source, disk / "demo", 4, 2, fill)
        for word in ("model0-mp2.safetensors", "No space left on device", "nothing half-written"):
            assert word in str(caught.value)
        assert list((disk / "demo").iterdir()) == []
        with pytest.raises(CheckpointError, match=r"more bytes, but \d+ are free on its disk"):
            convert(source, disk / "demo", 4, 2)
        ballast.unlink()
        convert(source, disk / "demo", 4, 2)
        Checkpoint.open(disk / "demo").check_finite()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
