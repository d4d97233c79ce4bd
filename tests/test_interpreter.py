"""Programs of Triton run on the processor, by an interpreter that is wrong in silence where it is
not corrected: the corrections, what they make visible, and every implementation under them."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_hal.backends.portable import interpreter
from dsa_hal.cli import main
from dsa_hal.cli.test import COLUMNS
from dsa_hal.errors import Absent, ConfigError
from dsa_hal.matrix import INTERPRETED, Outcome, Row, cost_of, judge_at_once
from dsa_hal.registry import Impl
from dsa_hal.selection import OPS, use
from dsa_hal.target import stand_in

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
SLOW = pytest.mark.slow
TARGETS = (
    pytest.param("rocm:gfx950"),
    pytest.param("cuda:sm90", marks=SLOW),
    pytest.param("rocm:gfx942", marks=SLOW),
)
"""A minute each with two processors; the last two run the same programs in other configurations."""

PROCESSES = 2
PATIENCE = 1200


def environment() -> dict[str, str]:
    """Of processes that interpret, one of which has a core."""
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **one}


def asked(**request: Any) -> Any:
    """What `interpreter_probe.py` answers."""
    probe = Path(__file__).with_name("interpreter_probe.py")
    done = subprocess.run(
        [sys.executable, str(probe)], input=json.dumps(request), capture_output=True, text=True,
        env=environment(), timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# -- the corrections ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corrected() -> Any:
    return asked(corrected=True, numbers=True)


@pytest.fixture(scope="module")
def plain() -> Any:
    return asked(corrected=False, numbers=True)["numbers"]


def test_every_number_is_right(corrected: Any) -> None:
    wrong = {
        name: error
        for name, error in corrected["numbers"].items()
        if not isinstance(error, float) or error > 1e-6
    }
    assert not wrong


CORRECTED = (
    "product torch.bfloat16", "product torch.float8_e4m3fnuz", "arithmetic", "clamp", "to bf16",
    "to fp8", "from fp8", "larger than NaN",
)  # fmt: skip


@pytest.mark.parametrize("name", CORRECTED)
def test_each_correction_is_needed(plain: Any, name: str) -> None:
    """Should Triton's own interpreter learn it, its part of the corrections goes."""
    error = plain[name]
    assert not isinstance(error, float) or error > 1e-3, (
        f"this Triton interprets {name!r} rightly by itself: drop its correction from"
        " backends/portable/interpreter.py"
    )


def test_carelessness_shows(corrected: Any) -> None:
    strict = corrected["strictness"]
    assert strict["masked load"] == 2, "what was not loaded is NaN"
    assert "1 addresses outside the tensors" in strict["outside"]
    assert (strict["last forwards"], strict["last backwards"]) == (4, 0)


def test_a_process_that_compiles_cannot_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling = ModuleType("triton")
    compiling.__spec__ = ModuleSpec("triton", None)
    monkeypatch.setitem(sys.modules, "triton", compiling)
    monkeypatch.delenv(interpreter.VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="a process of its own"):
        interpreter.start()


def test_without_triton_nothing_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Absent, match="install triton"):
        interpreter.start()


# -- planted errors -----------------------------------------------------------------------------


def test_an_interpreter_without_the_corrections_fails() -> None:
    row = [["sparse_mla", "triton", "single"]]
    [[wrong, why]] = asked(corrected=False, rows=row, target="cuda:sm90")["rows"]
    [[right, detail]] = asked(corrected=True, rows=row, target="cuda:sm90")["rows"]
    assert wrong == "failed", why
    assert right == "ok", detail


MUTANTS = {
    "one key too many": (
        "indexer_logits", "(key >= start) & (key < end)", "(key >= start) & (key <= end)",
        "indexer_logits", "triton", "ragged",
    ),
    "absent keys count": (
        "sparse_mla", "(row >= 0) & (row < context)", "row < context",
        "sparse_mla", "triton", "short_holes",
    ),
    "columns outside": (
        "gemm", "mask=rows_ok[:, None] & cols_ok[None, :])", "mask=rows_ok[:, None])",
        "fp8_gemm", "triton", "ragged",
    ),
    "one scale": (
        "gemm", "(row_scale[:, None] * col_scale[None, :])", "row_scale[:, None]",
        "fp8_gemm", "triton", "odd",
    ),
}  # fmt: skip
"""What is wrong -> topic, text before and after, and the implementation and case that show it."""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_fails(name: str) -> None:
    """The text of a kernel changed in one place; unchanged it is right in `results`."""
    topic, before, after, op, impl, case = MUTANTS[name]
    mutant = [topic, before, after]
    [[status, detail]] = asked(
        corrected=True, mutant=mutant, rows=[[op, impl, case]], target="cuda:sm90"
    )["rows"]
    assert status == "failed", detail


def test_two_calls_find_what_the_twists_find() -> None:
    op = OPS["rms_norm"]
    row = next(c for c in op.cases if c.name == "odd")

    def verdict(**changes: Any) -> Outcome:
        right = Impl(op.name, "cpu", "toy", op.reference, lambda *_, **__: None)
        return judge_at_once(Row(op, replace(right, **changes), row), nullcontext)

    def contiguous(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Any:
        steps = torch.empty(x.shape).stride()
        return op.reference(x.as_strided(x.shape, steps, x.storage_offset()), weight, eps=eps)

    def greedy(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Any:
        out = op.reference(x, weight, eps=eps)
        weight.as_strided((1,), (1,), weight.storage_offset() + weight.numel()).zero_()
        return out

    with use(backend="cpu"):
        assert verdict().status == "ok"
        assert verdict(why_not=lambda *_, **__: "no").status == "refused"
        wrong = verdict(fn=lambda x, weight, eps=1e-6: op.reference(x, weight, eps=eps) + 1)
        assert wrong.status == "failed" and wrong.detail.startswith("plain: out")
        assert "memory beside weight was written" in verdict(fn=greedy).detail
        assert verdict(fn=contiguous).detail.startswith("poisoned and strided: out")


def test_an_unknown_target_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "rope", "--interpret", "rocm:gfx1"]) == 2
    assert "unknown target 'rocm:gfx1'" in capsys.readouterr().err


# -- the model ----------------------------------------------------------------------------------


@SLOW
def test_an_fp8_model_runs_where_units_multiply_the_other_dialect() -> None:
    """Weights, activations and both caches e4m3fn, as gfx942: as far from fp32 as the processor's
    FP8 model is, in prefill and decode."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpreted_model.py"), "rocm:gfx942"],
        capture_output=True, text=True, env=environment(), timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert "weights fp8" in told["formats"] and "index_fp8/128" in told["formats"]
    for phase in ("prefill", "decode"):
        error, noise = told[phase]
        assert 0 < error < 2 * noise, (phase, error, noise)


# -- every implementation -----------------------------------------------------------------------


@cache
def interpreted(target: str) -> dict[str, list[str]]:
    """Op -> implementations of a target that are interpreted within the limit."""
    with use(target=stand_in(target, "cpu")) as chosen:
        found = {
            op.name: [
                v.impl.label
                for v in chosen.verdicts(op)
                if v.question == "ok" and interpreter.can_run(v.impl)
            ]
            for op in OPS.values()
            if any(INTERPRETED.admits(cost_of(op, case)) for case in op.cases)
        }
    return {op: labels for op, labels in found.items() if labels}


def judged(target: str, ops: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dsa_hal", "test", *ops, "--interpret", target, "--format", "csv"],
        capture_output=True, text=True, env=environment(), timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def results() -> Iterator[Any]:
    """A function: target -> op -> records of `dsa-hal test --interpret`, by some processes at a
    time, each with a part of the ops."""
    with ThreadPoolExecutor(PROCESSES) as pool:

        @cache
        def of(target: str) -> dict[str, list[dict[str, str]]]:
            ops = sorted(interpreted(target))
            parts = [part for at in range(PROCESSES) if (part := ops[at::PROCESSES])]
            found: dict[str, list[dict[str, str]]] = {}
            for text in pool.map(lambda part: judged(target, part), parts):
                for record in csv.DictReader(io.StringIO(text)):
                    found.setdefault(record["op"], []).append(record)
            return found

        yield of


@pytest.mark.parametrize(
    ("target", "op"),
    [
        pytest.param(*target.values, op, marks=target.marks)
        for target in TARGETS
        for op in interpreted(str(target.values[0]))
    ],
)
def test_matches_the_reference(results: Any, target: str, op: str) -> None:
    """Every implementation of an op, every small case, all twists."""
    found = results(target)[op]
    assert {record["impl"] for record in found} == set(interpreted(target)[op])
    failed = {(r["impl"], r["case"]): r["detail"] for r in found if r["status"] == "failed"}
    assert not failed
    assert any(record["status"] == "ok" for record in found), "all cases refused prove nothing"


@pytest.mark.parametrize("target", TARGETS)
def test_the_committed_results_are_current(results: Any, target: str) -> None:
    """So that a diff shows every cell that changed, and `dsa-hal report proof` tells the truth."""
    name = f"interpreted-{target.partition(':')[2]}.csv"
    kept = list(csv.DictReader(io.StringIO((ROOT / "ci" / "support" / name).read_text())))
    now = [record for op in OPS for record in results(target).get(op, [])]
    assert tuple(kept[0]) == COLUMNS and kept == now, (
        f"run: dsa-hal test --interpret {target} --format csv > ci/support/{name}"
    )
