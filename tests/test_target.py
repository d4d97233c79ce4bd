"""Targets without a device: what is known of them, what may be asked, and that nothing runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_process import Server
from torch import Tensor

import dsa_hal
from dsa_hal.autotune import store
from dsa_hal.autotune.space import Launched, Space
from dsa_hal.case import Cost, case
from dsa_hal.check import bitwise, each
from dsa_hal.errors import Absent, ConfigError
from dsa_hal.ops import rms_norm
from dsa_hal.registry import Op
from dsa_hal.selection import OPS, selection, use
from dsa_hal.target import Target, architectures, named, packages, probe, stand_in

STATED = [f"{backend}:{arch}" for backend in packages() for arch in architectures(backend)]
GFX = "rocm:gfx950"
absent_only = pytest.mark.skipif(isinstance(probe("rocm"), Target), reason="an AMD device is here")


@pytest.fixture(scope="module")
def dsa() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def toy() -> Iterator[Op[..., Any]]:
    """An op that rocm serves in plain torch."""
    before = dict(OPS)

    def toy_target(x: Tensor) -> Tensor:
        """x [n] -> x + 1."""
        return x + 1

    made = Op(
        toy_target, version=1, constant=(), variable={"n": "x[0]"},
        cost=lambda x: Cost(x.numel(), x.numel()), inputs=lambda make, n: {"x": make.randn(n)},
        cases=(case("one", n=4),), check=each(out=bitwise),
    )  # fmt: skip
    made.impl("rocm", "plain", contract=1)(lambda x: x + 1)
    yield made
    OPS.clear()
    OPS.update(before)


# -- what is known -----------------------------------------------------------------------------


def test_the_supported_devices_are_stated() -> None:
    assert {"cuda:sm90", "rocm:gfx950", "rocm:gfx942", "npu:a2", "npu:950"} <= set(STATED)
    gfx950, gfx942 = (architectures("rocm")[name] for name in ("gfx950", "gfx942"))
    assert (gfx950.shared, gfx950.processors, gfx950.bytes_per_s) == (160 << 10, 256, 8e12)
    assert (gfx942.shared, gfx942.processors, gfx942.bytes_per_s) == (64 << 10, 304, 5.3e12)
    assert (gfx950.fp8, gfx942.fp8) == (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


@pytest.mark.parametrize("text", STATED)
def test_a_target_is_this_machine_or_absent(text: str) -> None:
    backend, _, arch = text.partition(":")
    target, limits = named(text), architectures(backend)[arch]
    assert str(target) == text and target.limits is limits and limits.source
    if target.absent:
        assert target.device == "meta" and target.name == limits.device
        assert text in target.absent and "\n" not in target.absent
        with pytest.raises(Absent, match="nothing can be executed"):
            target.must_be_here()
    else:
        assert target == probe(backend)


def test_the_processor_is_never_absent() -> None:
    assert named("cpu:any").must_be_here() == probe("cpu")


@pytest.mark.parametrize(
    ("text", "words"),
    [("gfx950", "backend:arch"), ("tpu:v5", "backends are"), ("rocm:gfx90a", "rocm:gfx950")],
)
def test_unknown_targets_are_refused_with_what_is_known(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        named(text)


# -- what runs ---------------------------------------------------------------------------------


@absent_only
def test_a_called_and_a_bound_op_refuse(toy: Op[..., Any]) -> None:
    x = torch.zeros(4)
    with use(target=GFX) as chosen:
        assert chosen.target.absent and toy.select(x).label == "rocm/plain"
        with pytest.raises(Absent, match="toy_target: rocm:gfx950 is not in this machine"):
            toy(x)
        bound = toy.bind(x.to("meta"))
        with pytest.raises(Absent, match="nothing can be executed"):
            bound(x)


@absent_only
def test_what_stands_in_for_a_device_executes(toy: Op[..., Any]) -> None:
    for device in ("cpu", "meta"):
        with use(target=stand_in(GFX, device)) as chosen:
            assert str(chosen.target) == GFX and chosen.target.device == device
            assert toy(torch.zeros(4, device=device)).shape == (4,)
    with use(target=stand_in(GFX, "cpu")):
        assert toy(torch.zeros(4)).tolist() == [1.0] * 4


def test_questions_are_answered_for_a_target_that_is_absent() -> None:
    x, weight = torch.empty(2, 64, device="meta"), torch.empty(64, device="meta")
    for text in ("rocm:gfx950", "cuda:sm90"):
        with use(target=text):
            verdicts = dsa_hal.explain(rms_norm, x, weight)
            assert [v.impl.backend for v in verdicts if v.impl.name == "triton"] == [
                text.partition(":")[0]
            ]


# -- the command line --------------------------------------------------------------------------


@absent_only
def test_commands_that_ask_run_and_those_that_execute_refuse(dsa: Server, tmp_path: Path) -> None:
    asked = {"DSA_HAL_TARGET": GFX, "DSA_HAL_CACHE": str(tmp_path)}
    for words in (["test", "rms_norm"], ["bench", "rms_norm"], ["generate", "--prompt", "hi"],
                  ["tune", "rms_norm"], ["report", "cost"]):  # fmt: skip
        assert f"{GFX} is not in this machine" in dsa(*words, **asked).error, words
    table = dsa("support", "rms_norm", "--format", "json", **asked)
    assert table.code == 0 and {row["target"] for row in json.loads(table.out)} == {GFX}
    told = dsa("explain", "rms_norm", **asked)
    assert told.code == 0 and f"on {GFX}" in told.out and "rocm/triton" in told.out
    doctor = dsa("doctor", "--format", "json", **asked)
    found = {(f["section"], f["name"]): f for f in json.loads(doctor.out)}
    assert doctor.code == 0 and found["self-test", "target"]["state"] == "absent"
    assert found["environment", "DSA_HAL_TARGET"]["text"] == GFX


@absent_only
def test_backend_and_target_agree_or_are_refused(dsa: Server) -> None:
    both = {"DSA_HAL_TARGET": GFX, "DSA_HAL_BACKEND": "cpu"}
    assert "contradict each other" in dsa("support", "rms_norm", **both).error
    same = dsa("explain", "rms_norm", DSA_HAL_TARGET=GFX, DSA_HAL_BACKEND="rocm")
    assert same.code == 0 and f"on {GFX}" in same.out
    other = dsa("explain", "rms_norm", "--backend", "cpu", DSA_HAL_TARGET=GFX)
    assert other.code == 0 and "on cpu:any" in other.out
    assert "unknown target" in dsa("support", DSA_HAL_TARGET="rocm:gfx1100").error


# -- configurations ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile(Launched):
    """A toy configuration."""

    size: int
    warps: int


@dataclass(frozen=True)
class WaveTile(Tile):
    """The same with an option of one compiler."""

    waves: int = 0


@pytest.fixture
def space() -> Iterator[Space[Tile]]:
    made: Space[Tile] = Space("toy_target/tiled", Tile, lambda n: [Tile(n, 4)])
    made.on("rocm", lambda limits, n: [WaveTile(limits.shared // n, 8, waves=2), Tile(n, 1)])
    yield made
    del Space.ALL[made.name]


def test_each_target_has_its_own_configurations(space: Space[Tile]) -> None:
    for text, size in (("rocm:gfx950", 160 << 10), ("rocm:gfx942", 64 << 10)):
        with use(target=text):
            assert space.pick(n=2) == WaveTile(size // 2, 8, waves=2)
            assert len(space.choices(n=2)) == 2
    with use(target="cuda:sm90"):
        assert space.pick(n=2) == Tile(2, 4)
    with use(target=GFX), space.forced(Tile(9, 1)):
        assert space.pick(n=2) == Tile(9, 1)


def test_options_are_those_that_the_compiler_is_told() -> None:
    assert Tile(64, 4).options == {"num_warps": 4}
    assert WaveTile(64, 8, waves=2).options == {"num_warps": 8, "waves_per_eu": 2}
    assert WaveTile(64, 8) == WaveTile(64, 8, waves=0), "what was told does not change equality"


def test_a_backend_has_one_list(space: Space[Tile]) -> None:
    with pytest.raises(ValueError, match="two lists for rocm"):
        space.on("rocm", lambda limits, n: [])


@absent_only
def test_a_static_table_fits_every_device_and_gives_way_to_a_measured_one(
    space: Space[Tile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSA_HAL_CACHE", str(tmp_path))
    with use(target=GFX):
        mine = selection().target
        of_any = Target("rocm", "gfx950", name="another card of it")

        def entry(size: int, warps: int) -> dict[str, Any]:
            rows = [{"facts": {"n": 2}, "config": {"size": size, "warps": warps}}]
            winners = [{"call": {}, "us": {"tiled": 1.0}}]
            return {"contract": 1, "winners": winners, "configs": {space.name: rows}}

        store.keep(store.user_file(mine), of_any, "toy_target", entry(2, 1), static=True)
        assert store.winners("toy_target", 1, mine) == (), "rank stands until it is measured"
        space.forget()
        assert store.read(store.user_file(mine))["stamp"]["static"] is True
        assert space.pick(n=2) == Tile(2, 1), "its name is no matter"
        store.keep(store.user_file(mine), of_any, "toy_target", entry(2, 1))
        space.forget()
        assert isinstance(space.pick(n=2), WaveTile), "measured elsewhere, and so not used"
    store._tables.cache_clear()
