"""The H200's suite: its workloads are requests, a wrong result has no time, and the arithmetic of
its tables. What needs the GPU is proved there, by `ci/device.sh`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsa_hal.case import Inputs, Maker
from dsa_hal.cli import main
from dsa_hal.cli.suites import _race, _tables, _work, h200
from dsa_hal.cli.suites._race import Contender, DeviceMaker
from dsa_hal.cli.suites._tables import Line
from dsa_hal.cli.suites._work import Work, inputs_of, workloads
from dsa_hal.measure import Timing
from dsa_hal.selection import use

SMALL: dict[str, dict[str, Any]] = {
    "sparse_mla": dict(tokens=5, context=40, heads=2, k=16),
    "sparse_mla_paged": dict(batch=3, next_n=2, context=70, heads=2, k=16),
    "sparse_mla_bwd": dict(tokens=5, context=40, heads=2, k=16),
    "indexer_logits": dict(tokens=5, context=40),
    "indexer_logits_paged": dict(batch=3, next_n=2, context=70),
    "topk": dict(rows=5, n=60, k=16),
    "indexer_topk": dict(tokens=5, context=40, topk=16),
    "fp8_gemm": dict(m=5, n=128, k=256),
    "grouped_fp8_gemm": dict(m=8, groups=4, n=128, k=128),
    "grouped_fp8_gemm_masked": dict(max_m=5, groups=3, n=128, k=128),
}


def small(work: Work) -> Work:
    """The same op with axes that a processor computes at once."""
    taken = _work._request_rows(2) if work.op.name == "indexer_logits_paged" else work.taken
    return replace(work, axes={**work.axes, **SMALL[work.op.name]}, taken=taken)


SMALL_WORK = {work.op.name: small(work) for work in workloads()}


def test_workloads_are_requests_and_have_names_of_their_own() -> None:
    for work in workloads():
        inputs = work.op.inputs(Maker("meta", 0), **work.axes)
        assert work.op.invalid(**inputs) is None, work.label
        assert work.op.cost(**inputs).bytes > 0
    assert len({(work.group.name, work.label) for work in workloads()}) == len(workloads())


@pytest.mark.parametrize("name", [n for n, w in SMALL_WORK.items() if w.rows and not w.alone])
def test_rows_alone_are_the_rows_of_the_whole(name: str) -> None:
    """What the reference makes of some rows is what it makes of them among all."""
    work = SMALL_WORK[name]
    inputs = inputs_of(work, DeviceMaker("cpu", 0))
    assert work.rows is not None
    at = torch.tensor([0, 2])
    part = work.rows(inputs, at)
    found = work.op.reference(**inputs)
    whole = [found] if isinstance(found, torch.Tensor) else found
    want = work.op.reference(**part)
    want = [want] if isinstance(want, torch.Tensor) else want
    got = work.taken(whole, at) if work.taken else [result[at] for result in whole]
    assert work.op.check(got, want, part).ok


def test_sampled_rows_hold_the_first_and_the_last() -> None:
    work = SMALL_WORK["topk"]
    at = work.sample({"logits": torch.empty(1000, 1)})
    assert at is not None and at[0] == 0 and at[-1] == 999 and len(at) == _work.ROWS
    few = work.sample({"logits": torch.empty(3, 1)})
    assert few is not None and few.tolist() == [0, 1, 2]


def test_groups_are_equal_and_full() -> None:
    work = SMALL_WORK["grouped_fp8_gemm"]
    layout = inputs_of(work, DeviceMaker("cpu", 0))["grouped_layout"]
    assert layout.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    masked = inputs_of(SMALL_WORK["grouped_fp8_gemm_masked"], DeviceMaker("cpu", 0))
    assert masked["masked_m"].tolist() == [5, 5, 5]


# -- judging and timing -------------------------------------------------------------------------

LIMITS = h200.Limits(copy=1e12, bf16=1e14, fp8=2e14)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The suite's judging on a processor, with a clock that says 1 ms for everyone."""

    def race(contenders: Sequence[Contender], device: torch.device, repeats: int) -> list[Timing]:
        return [Timing.of([1e-3] * repeats) for _ in contenders]

    monkeypatch.setattr(h200, "race", race)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(h200, "peers", lambda op, inputs: iter(()))
    with use(backend="cpu"):
        yield


@pytest.mark.parametrize("name", SMALL_WORK)
def test_right_results_are_timed(processor: None, name: str) -> None:
    lines = h200._lines(SMALL_WORK[name], LIMITS)
    timed = [line for line in lines if line.status == "ok"]
    assert timed and all(line.median_s == 1e-3 and line.floor_s for line in timed)
    assert sum(line.selected for line in timed) == 1
    assert not [line for line in lines if line.status == "failed"]


def test_a_wrong_or_raising_peer_has_no_time(
    processor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = SMALL_WORK["fp8_gemm"]

    def peers(op: str, inputs: Inputs) -> Iterator[Contender]:
        def wrong(**given: Any) -> torch.Tensor:
            found: torch.Tensor = work.op.reference(**given)
            return found + (torch.arange(found.shape[0]) == found.shape[0] - 1)[:, None]

        def raising(**given: Any) -> torch.Tensor:
            raise RuntimeError("no kernel image")

        yield Contender("right", work.op.reference, inputs, peer=True)
        yield Contender("wrong in the last row", wrong, inputs, peer=True)
        yield Contender("raising", raising, inputs, peer=True)

    monkeypatch.setattr(h200, "peers", peers)
    lines = {line.name: line for line in h200._lines(work, LIMITS)}
    assert lines["right"].status == "ok" and lines["right"].side == "peer"
    for name, reason in (("wrong in the last row", "calc_diff"), ("raising", "no kernel image")):
        assert lines[name].status == "failed" and reason in lines[name].detail
        assert lines[name].median_s is None


def test_a_workload_of_a_decode_step_is_timed_in_a_recording(
    processor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A contender that cannot be recorded is refused with the reason; it is not timed otherwise."""

    def chain(
        contenders: Sequence[Contender], device: torch.device, repeats: int
    ) -> list[Timing | str]:
        return [Timing.of([2e-3]) if c.peer else "it waits for the host" for c in contenders]

    def peers(op: str, inputs: Inputs) -> Iterator[Contender]:
        yield Contender("a peer", work.op.reference, inputs, peer=True)

    work = replace(SMALL_WORK["fp8_gemm"], recorded=True)
    monkeypatch.setattr(h200, "chain", chain)
    monkeypatch.setattr(h200, "peers", peers)
    lines = h200._lines(work, LIMITS)
    assert [line.median_s for line in lines if line.side == "peer"] == [2e-3]
    own = [line for line in lines if line.side == "own"]
    assert own and all(line.median_s is None for line in own)
    assert any("waits for the host" in line.detail for line in own)


def test_what_a_device_does_not_record_is_said() -> None:
    contender = Contender("ours", lambda x: x, {"x": torch.zeros(8)}, own=True)
    (found,) = _race.chain([contender], torch.device("cpu"), 3)
    assert isinstance(found, str) and "cpu records no work" in found


# -- tables -------------------------------------------------------------------------------------


def line(shape: str, name: str, side: str, seconds: float, *, selected: bool = False) -> Line:
    return Line(
        "top-k", "topk", shape, name, side, "ok", "", seconds, seconds, seconds, 15, 1.0, 1.0,
        1e-5, selected,
    )  # fmt: skip


LINES = (
    line("a", "cuda/cuda", "own", 2e-5, selected=True),
    line("a", "cuda/torch", "own", 9e-5),
    line("a", "cuda/flashinfer", "adapter", 1.6e-5),
    line("a", "FlashInfer", "peer", 4e-5),
    line("b", "cuda/cuda", "own", 2e-5, selected=True),
    line("b", "FlashInfer", "peer", 1.6e-4),
    replace(line("b", "FlashInfer, CUB", "peer", 1e-9), status="failed", median_s=None),
)


def test_the_best_of_each_side_and_the_mean_of_ratios() -> None:
    a, b = _tables.shapes(LINES)
    assert (a.own, a.peer) == (("cuda/cuda", 2e-5), ("FlashInfer", 4e-5))
    assert a.ratio == pytest.approx(2) and b.ratio == pytest.approx(8)
    assert _tables.means([a, b]) == {"top-k": pytest.approx(4)}
    assert a.behind == pytest.approx(0.25), "the adapter, which is installed, is faster"
    assert b.behind == pytest.approx(0)


def test_the_tables_say_what_was_reached(capsys: pytest.CaptureFixture[str]) -> None:
    _tables.summary(_tables.shapes(LINES), {"top-k": 1.5})
    out = capsys.readouterr().out
    assert "4.00x" in out and "1.5x" in out and "reached" in out and "not reached" not in out


def test_the_picture_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    from dsa_hal.cli.suites._picture import race

    assert race("NVIDIA H200", _tables.shapes(LINES)).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["bench", "--suite", "h300"], "unknown suite 'h300'; did you mean h200?"),
        (["bench"], "bench needs an op or --suite"),
        (["bench", "topk", "--plot", "x.png"], "--plot draws a suite"),
        (["bench", "--suite", "h200", "--backend", "cpu"], "needs an NVIDIA GPU"),
    ],
)
def test_requests_that_cannot_be_served(
    capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert main(words) == 2
    assert sentence in capsys.readouterr().err
