"""Prefill attention on NVIDIA GPUs, as far as it shows without one: who serves which case, the
configurations of the kernels, and what Python and CUDA C++ must agree on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa_hal.backends.cuda import _prefill
from dsa_hal.backends.portable import dense
from dsa_hal.ops.attention import sparse_mla
from dsa_hal.ops.dense import dense_mla, mha_prefill
from dsa_hal.registry import Impl, Op
from dsa_hal.target import Target

H200 = Target("cuda", "sm90", "meta", "NVIDIA H200")
OPS = (sparse_mla, dense_mla, mha_prefill)
SHARED = 227 << 10
"""Bytes of shared memory that a block of Hopper has."""


def serving(op: Op[..., Any], case: str) -> list[str]:
    """The implementations that take a case, best first."""
    (made,) = (c.make(op.inputs, "meta") for c in op.cases if c.name == case)
    wanted = op.requests(**made) if op.requests is not None else frozenset()
    found: tuple[Impl[..., Any], ...] = op.implementations(H200)
    return [
        i.name for i in found
        if i.backend == "cuda" and wanted <= i.promises and i.why_not(**made) is None
    ]  # fmt: skip


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_case_is_served(op: Op[..., Any]) -> None:
    assert [case.name for case in op.cases if not serving(op, case.name)] == []


def test_who_serves() -> None:
    for case in ("prefill_8k", "fp16", "v4"):
        assert serving(sparse_mla, case)[:2] == ["cuda", "triton"], case
    for case in ("one", "fp32"):
        assert serving(sparse_mla, case)[0] == "triton", case
    assert serving(dense_mla, "decode_b128") == ["cuda", "triton"]
    assert serving(dense_mla, "fp32") == ["triton"]


def test_a_refusal_names_what_was_found() -> None:
    assert "torch.float32" in str(_prefill.why_not(torch.float32, 576, 512))
    assert "640" in str(_prefill.why_not(torch.bfloat16, 640, 512))
    assert "2048" in str(dense.why_not(torch.bfloat16, 2048, 512))


@pytest.mark.parametrize("blocks", [1, 2, 31, 132, 133, 256, 1056])
@pytest.mark.parametrize("tiles", [1, 3, 128, 4096])
def test_keys_are_split_to_fill_the_processors(blocks: int, tiles: int) -> None:
    choices = _prefill.SPACE.legal(blocks=blocks, tiles=tiles)
    splits = [c.splits for c in choices]
    assert sorted(set(splits)) == sorted(splits) and 1 in splits
    assert max(splits) <= min(64, tiles)
    rounds = [-(-blocks * s // _prefill.PROCESSORS) * -(-tiles // s) for s in splits]
    assert rounds[0] <= 1.2 * min(rounds) + _prefill.RESTART * -(-blocks // _prefill.PROCESSORS)
    if blocks * 4 <= _prefill.PROCESSORS and tiles == 4096:
        assert splits[0] >= 4


@pytest.mark.parametrize("rows", [1, 16, 33, 100, 128])
@pytest.mark.parametrize(("width", "size"), [(40, 2), (192, 2), (576, 2), (576, 4)])
def test_tiles_of_dense_attention(rows: int, width: int, size: int) -> None:
    choices = dense.SPACES["mha_prefill"].legal(rows=rows, width=width, size=size)
    assert choices
    for config in choices:
        assert config.rows <= max(16, 2 * rows) and config.keys in (16, 32, 64)
        assert config.rows * width * size + config.keys * width * size <= SHARED


def test_python_and_the_source_agree() -> None:
    folder = Path(_prefill.__file__).parent / "_kernels"
    source = "".join(path.read_text() for path in folder.glob("sparse_prefill*"))
    stated = dict(re.findall(r"\b([A-Z]+) = (\d+)\b", source))
    for name in ("ROWS", "KEYS", "VALUES", "STAGES", "HELD"):
        assert int(stated[name]) == getattr(_prefill, name), name
    assert all(_prefill.shared_bytes(dim) <= SHARED for dim in (512, 576))


def test_one_lane_arrives_only_where_the_tensor_cores_read() -> None:
    """racecheck follows what a thread stored or loaded itself only if that thread arrives: a lane
    for its warp is for barriers whose data copies and products alone touch."""
    source = (Path(_prefill.__file__).parent / "_kernels" / "sparse_prefill.cu").read_text()
    arrivals = re.findall(r"\barrive(?:_if)?\((.*?)base \+ ([A-Z_]+)", source)
    assert len(arrivals) == 9
    alone = {
        barrier for condition, barrier in arrivals if "lane" in condition or "& 31" in condition
    }
    assert alone == {"K_FULL", "Q_FULL", "Q_FREE"}
    counts = dict(re.findall(r"barrier_init\(base \+ ([A-Z_]+)[^,]*, (\d+)\)", source))
    threads = {"P_FULL": 128, "P_FREE": 256, "K_FREE": 256, "FACTOR_FULL": 128, "FACTOR_FREE": 256}
    assert {barrier: int(counts[barrier]) for barrier in threads} == threads
