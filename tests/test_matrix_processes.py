"""`dsa-hal test --jobs` and `--repeats`: rows in processes of their own, and calls that must agree
to the bit."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from dsa_hal import ops
from dsa_hal.cli import main
from dsa_hal.matrix import Row, judge
from dsa_hal.registry import Impl
from dsa_hal.selection import use


def test_a_call_that_differs_is_found_by_repeats() -> None:
    """One element, one step of bf16, at the third call: within the check, and another result."""
    op = ops.fp8_gemm
    case = next(c for c in op.cases if c.name == "more")
    with use(backend="cpu") as chosen:
        impl: Impl[..., Any] = chosen.candidates(op)[0][0]
        calls = 0

        def flaky(**inputs: Any) -> Tensor:
            nonlocal calls
            calls += 1
            out: Tensor = impl.fn(**inputs)
            if calls == 3:
                out[0, 0] *= 1 + 2.0**-7
            return out

        row = Row(op, replace(impl, fn=flaky), case)
        assert judge(row).status == "ok"
        calls = 0
        found = judge(row, repeats=5)
    assert found.status == "failed" and found.detail == "repeat: call 3 gave other bytes"


def process(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[list[str]]:
    """Every child process answers like this; -> the commands they were started with."""
    asked: list[list[str]] = []

    def run(command: Sequence[str], **_: Any) -> Any:
        asked.append(list(command))
        found = answer(command)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def judged(command: Sequence[str]) -> Any:
    """A child that judged all its cases and found the first one wrong."""
    cases = command[command.index("--case") + 1 :]
    records = [
        {"case": name, "status": "failed" if at == 0 else "ok", "detail": "off by one" * (at == 0)}
        for at, name in enumerate(cases)
    ]
    return subprocess.CompletedProcess(command, 1, json.dumps(records), "a traceback")


WORDS = ["test", "plan", "to_slots", "--jobs", "2", "--repeats", "7", "--backend", "cpu"]


def test_rows_come_back_from_their_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = process(monkeypatch, judged)
    assert main([*WORDS, "--format", "json"]) == 1
    told = capsys.readouterr()
    records = json.loads(told.out)
    assert [r["op"] for r in records if r["status"] == "failed"] == ["plan", "to_slots"]
    assert "a traceback" in told.err
    assert len(asked) == 2 and all(c[c.index("--repeats") + 1] == "7" for c in asked)


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (subprocess.CompletedProcess([], -11, "", "Segmentation fault"), "exit code -11"),
        (subprocess.CompletedProcess([], 1, "", "no JSON"), "exit code 1"),
        (subprocess.TimeoutExpired([], 600), "not done after 600 s"),
    ],
)
def test_a_process_that_dies_or_hangs_fails_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: Any, detail: str
) -> None:
    process(monkeypatch, lambda command: answer if "plan" in command else judged(command))
    assert main([*WORDS, "--format", "json"]) == 1
    records = json.loads(capsys.readouterr().out)
    mine = [r for r in records if r["op"] == "plan"]
    assert mine and all(r["status"] == "failed" and detail in r["detail"] for r in mine)
    assert [r for r in records if r["op"] == "to_slots" and r["status"] == "ok"]
