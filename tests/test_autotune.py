"""Tuning: spaces of configurations, the search on a toy op, tables and their nearest entries, and
`dsa-hal tune`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from dsa_hal.autotune import store
from dsa_hal.autotune.search import ROUNDS, Search
from dsa_hal.autotune.space import Space
from dsa_hal.autotune.store import Winner, nearest
from dsa_hal.case import Cost, case
from dsa_hal.check import bitwise, each
from dsa_hal.cli import main
from dsa_hal.errors import ConfigError
from dsa_hal.facts import described
from dsa_hal.registry import Impl, Op
from dsa_hal.selection import OPS, selection, use
from dsa_hal.target import Target


@dataclass(frozen=True)
class Tile:
    """A toy configuration: how long the kernel sleeps, and whether it is right."""

    sleep_ms: int
    wrong: int = 0


TILES = [Tile(3), Tile(0, wrong=1), Tile(1), Tile(9)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSA_HAL_CACHE", str(tmp_path))
    store._tables.cache_clear()
    return tmp_path


@pytest.fixture
def space(cache: Path) -> Iterator[Space[Tile]]:
    made = Space("toy_tuned/tiled", Tile, lambda n: [t for t in TILES if t.sleep_ms <= n])
    yield made
    del Space.ALL[made.name]


@pytest.fixture
def op(space: Space[Tile]) -> Iterator[Op[..., Any]]:
    """An op with a kernel of four configurations, one of them wrong, and a plain rival."""
    before = dict(OPS)

    def toy_tuned(x: Tensor, k: int = 1) -> Tensor:
        """x [n] -> x + k."""
        return x + k

    def cost(x: Tensor, k: int = 1) -> Cost:
        return Cost(x.numel(), 2 * x.numel())

    made = Op(
        toy_tuned, version=2, constant=("k",), variable={"n": "x[0]"}, cost=cost,
        inputs=lambda make, n, k: {"x": make.randn(n), "k": k},
        cases=(case("one", n=64, k=2, model=True),), check=each(out=bitwise),
    )  # fmt: skip

    def tiled(x: Tensor, k: int = 1) -> Tensor:
        tile = space.pick(n=x.shape[0])
        time.sleep(tile.sleep_ms / 1e3)
        return x + k + tile.wrong

    def steady(x: Tensor, k: int = 1) -> Tensor:
        time.sleep(2e-3)
        return x + k

    def picky(x: Tensor, k: int = 1) -> str | None:
        return f"k is {k}; this one adds 1 only" if k != 1 else None

    with use(backend="cpu"):
        made.impl("cpu", "tiled", contract=2)(tiled)
        made.impl("cpu", "steady", contract=2, rank=5)(steady)
        made.impl("cpu", "picky", contract=2, rank=9, why_not=picky)(toy_tuned)
        yield made
    OPS.clear()
    OPS.update(before)


# -- spaces ------------------------------------------------------------------------------------


def test_the_first_legal_configuration_serves_until_something_is_measured(
    space: Space[Tile],
) -> None:
    assert space.pick(n=64) == Tile(3) and space.asked == {(64,): {"n": 64}}
    with space.forced(Tile(9)):
        assert space.pick(n=64) == space.pick(n=65) == Tile(9)
    assert space.pick(n=64) == Tile(3)


def test_the_nearest_measured_configuration_serves_if_it_is_legal(space: Space[Tile]) -> None:
    here = selection().target
    rows = [
        {"facts": {"n": 8}, "config": {"sleep_ms": 1, "wrong": 0}},
        {"facts": {"n": 512}, "config": {"sleep_ms": 9, "wrong": 0}},
        {"facts": {"m": 400}, "config": {"sleep_ms": 0, "wrong": 1}},
    ]
    entry = {"contract": 2, "winners": [], "configs": {space.name: rows}}
    store.write(store.user_file(here), here, {"toy_tuned": entry})
    space.forget()
    assert space.pick(n=9) == Tile(1)
    assert space.pick(n=400) == Tile(9)
    assert space.pick(n=4) == Tile(1), "9 ms is not legal there, whatever was measured near"
    assert space.pick(n=64) == Tile(3), "nothing was measured near: the best guess"


def test_a_space_is_declared_once(space: Space[Tile]) -> None:
    with pytest.raises(ValueError, match="toy_tuned/tiled is declared twice"):
        Space("toy_tuned/tiled", Tile, lambda n: TILES)


# -- the search --------------------------------------------------------------------------------


def test_the_search_finds_the_fastest_right_configuration(
    op: Op[..., Any], space: Space[Tile], cache: Path
) -> None:
    inputs = {"x": torch.zeros(64), "k": 2}
    impls = [i for i in op.implementations(selection().target) if i.name != "reference"]
    search = Search(op, inputs, (torch.full((64,), 2.0),), "cpu", cache / "lock", most=9)
    by_name = {c.impl.name: c for c in search.race(impls)}
    tiled, steady, picky = (by_name[name] for name in ("tiled", "steady", "picky"))
    assert list(by_name) == ["tiled", "steady", "picky"], "fastest first, then who took no part"
    assert tiled.chosen == {space: Tile(1)} and tiled.us and 1000 <= tiled.us < 2000
    assert len(tiled.failures) == 1 and "wrong=1" in tiled.failures[0]
    assert tiled.rows() == {
        space.name: [{"facts": {"n": 64}, "config": {"sleep_ms": 1, "wrong": 0}}]
    }
    assert steady.us and steady.us >= 2000 and not steady.failures
    assert picky.us is None and picky.refusal == "k is 2; this one adds 1 only"
    assert space.pick(n=64) == Tile(3), "a search leaves no choice behind"


def test_contenders_take_turns(
    op: Op[..., Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ran all its calls in a row would meet the clock that its own calls left."""
    timed: list[str] = []

    def us(self: Search, impl: Impl[..., Any], repeats: int) -> float:
        timed.append(impl.name)
        return 10.0 if len(timed) % 5 else 1e6  # now and then another user of the device

    monkeypatch.setattr(Search, "_us", us)
    impls = [i for i in op.implementations(selection().target) if i.name in ("tiled", "steady")]
    inputs = {"x": torch.zeros(64), "k": 2}
    search = Search(op, inputs, (torch.full((64,), 2.0),), "cpu", cache / "lock", most=1)
    found = search.race(impls)
    race = timed[-2 * ROUNDS :]
    assert race == [race[0], race[1]] * ROUNDS and race[0] != race[1]
    assert [c.us for c in found] == [10.0, 10.0], "a disturbed round does not count"


def test_what_raises_is_told_and_takes_no_part(op: Op[..., Any], cache: Path) -> None:
    def broken(x: Tensor, k: int = 1) -> Tensor:
        raise RuntimeError("no such instruction")

    op.impl("cpu", "broken", contract=2)(broken)
    impls = [i for i in op.implementations(selection().target) if i.name == "broken"]
    search = Search(op, {"x": torch.zeros(4)}, (torch.ones(4),), "cpu", cache / "lock", most=9)
    (contender,) = search.race(impls)
    assert contender.us is None and "RuntimeError: no such instruction" in contender.failures[0]


# -- tables ------------------------------------------------------------------------------------


def test_calls_in_words() -> None:
    def fn(a: Tensor, rest: list[Tensor], b: Tensor | None = None, *, k: int = 3) -> None: ...

    words = described(fn)(torch.ones(2, 7, dtype=torch.bfloat16), [torch.ones(1)] * 2)
    assert words == {"a": "bfloat16[2, 7]", "rest": "float32[1] float32[1]", "k": 3}


def test_the_nearest_measurement_by_all_sizes() -> None:
    small = Winner({"a": "float32[64, 128]", "k": 8}, {"quick": 1.0, "steady": 2.0})
    large = Winner({"a": "float32[4096, 128]", "k": 8}, {"steady": 5.0, "quick": 9.0})
    both, every = (small, large), {"quick", "steady"}
    assert nearest(both, {"a": "float32[100, 128]", "k": 8}, every) == "quick"
    assert nearest(both, {"a": "float32[3000, 128]", "k": 16}, every) == "steady"
    assert nearest(both, {"a": "float32[100, 128]", "k": 8}, {"steady"}) == "steady"
    assert nearest(both, {"a": "float32[1]"}, {"other"}) is None
    assert small.distance({"a": "bfloat16[64, 128]", "k": 8}) > large.distance(
        {"a": "float32[64, 128]", "k": 8}
    ), "another dtype is further away than another size"


def test_entries_of_other_ops_stay(cache: Path) -> None:
    here, path = selection().target, cache / "table.yaml"
    for name in ("first", "second", "first"):
        store.keep(path, here, name, {"contract": 1, "winners": [], "configs": {}})
    assert list(store.read(path)["ops"]) == ["first", "second"]


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ({"facts": {"n": 8}}, "expected facts and config"),
        ({"facts": {"n": 8}, "config": {"sleep_ms": "long"}}, "whole numbers"),
    ],
)
def test_a_corrupt_configuration_names_the_file(
    space: Space[Tile], row: dict[str, Any], wrong: str
) -> None:
    here = selection().target
    entry = {"contract": 2, "winners": [], "configs": {space.name: [row]}}
    store.write(store.user_file(here), here, {"toy_tuned": entry})
    space.forget()
    with pytest.raises(ConfigError, match=wrong) as caught:
        space.pick(n=1000)
    assert str(store.user_file(here)) in str(caught.value)


SHIPPED = sorted((Path(__file__).parent.parent / "backends").glob("*/tuned/*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tables_name_what_is_there(path: Path) -> None:
    """Ops, contracts, implementations and configurations of a shipped table exist in this tree; a
    derived one claims no times."""
    table = store.read(path)
    stamp = table["stamp"]
    target = Target(stamp["backend"], stamp["arch"], "cuda", stamp["device"])
    for name, entry in table["ops"].items():
        assert entry["contract"] == OPS[name].version, name
        known = {impl.name for impl in OPS[name].implementations(target)}
        for winner in store.winners(name, entry["contract"], target):
            assert set(winner.us) <= known, f"{name}: {winner.us}"
        for row in entry["winners"]:
            assert ("us" in row) != ("derived_from" in stamp), name
        for space in entry["configs"]:
            op_name, _, impl = space.partition("/")
            assert op_name == name and impl.partition(":")[0] in known, space


def test_there_is_a_table_for_each_device_of_the_readme() -> None:
    assert {path.stem for path in SHIPPED} >= {"h200", "h800"}


# -- the command -------------------------------------------------------------------------------


def test_tune_writes_what_selection_reads(
    op: Op[..., Any], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert op.select(torch.ones(64), 2).name == "steady", "the best by rank"
    assert main(["tune", "toy_tuned", "--backend", "cpu"]) == 1, "one configuration was wrong"
    out = capsys.readouterr().out
    assert "sleep_ms=1 wrong=0" in out and "wrong=1" in out
    with use(backend="cpu"):
        assert op.select(torch.ones(64), 2).name == "tiled"
    path = store.user_file(selection().target)
    entry = yaml.safe_load(path.read_text())["ops"]["toy_tuned"]
    assert entry["contract"] == 2 and entry["with"]["torch"] == str(torch.__version__)
    assert list(entry["winners"][0]["us"]) == ["tiled", "steady"]


def test_a_derived_table_says_so_and_has_no_times(
    op: Op[..., Any], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["tune", "toy_tuned", "--backend", "cpu"])
    derived = cache / "other.yaml"
    assert main(["tune", "--backend", "cpu", "--derive", "OTHER 9", "--output", str(derived)]) == 0
    assert "not measured on OTHER 9" in capsys.readouterr().err
    table = yaml.safe_load(derived.read_text())
    assert table["stamp"]["device"] == "OTHER 9" and table["stamp"]["derived_from"]
    assert table["ops"]["toy_tuned"]["winners"][0]["rank"] == {"tiled": 1, "steady": 2}
    assert "us" not in table["ops"]["toy_tuned"]["winners"][0]


def test_what_writes_nothing_says_so(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Static tuning knows programs of Triton alone, and the processor has none."""
    path = cache / "none.yaml"
    words = ["tune", "topk", "--static", "--impl", "nobody", "--output", str(path)]
    with use(target="rocm:gfx950"):
        assert main(words) == 0
    said = capsys.readouterr().err
    assert "nothing is written: rocm:gfx950" in said and not path.exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--derive", "X"], "--derive needs --output FILE"),
        (["--derive", "X", "--output", "x.yaml", "--input", "none.yaml"], "none.yaml does not"),
        (["topkk"], "did you mean topk"),
        (["topk", "--case", "nope"], "unknown case 'nope'"),
    ],
)
def test_wrong_requests_get_a_sentence(
    cache: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert main(["tune", "--backend", "cpu", *words]) == 2
    assert sentence in capsys.readouterr().err
