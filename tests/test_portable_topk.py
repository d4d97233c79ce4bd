"""Selection in Triton: plans for every call, chunks, and all forms in the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa_hal.backends.portable import index_select, select
from dsa_hal.ops.select import MAX_K
from dsa_hal.selection import use
from dsa_hal.target import stand_in

TARGETS = ("rocm:gfx950", "rocm:gfx942", "cuda:sm90")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rows", [1, 64, 4096])
@pytest.mark.parametrize("n", [1, 4096, 32768, 1 << 20])
@pytest.mark.parametrize("k", [1, 2048, MAX_K])
def test_every_plan_halves_a_row(target: str, rows: int, n: int, k: int) -> None:
    """What the kernels take for granted: powers of two, ranks of 16 bits, threads of a block, room
    for k twice in a piece of a row that has several, and a list that a sample leaves half empty."""
    with use(target=stand_in(target, "cpu")) as chosen:
        import_of = {"rocm": "dsa_hal.backends.rocm.topk", "cuda": "dsa_hal.backends.cuda.topk"}
        __import__(import_of[chosen.target.backend])
        limits = chosen.target.limits
        assert limits is not None
        plans = select.SPACE.choices(rows=rows, n=n, k=k, processors=limits.processors)
    assert plans and len(set(plans)) == len(plans)
    for plan in plans:
        assert plan.held in (*select.SIZES, max(1024, n)) and plan.held <= select.SIZES[-1]
        assert 1 <= plan.warps <= 1024 // limits.lanes
        if plan.sample:
            assert plan.sample <= 8192 and n >= 2 * select.room(k) >= 4 * k
        elif n > plan.held:
            assert plan.held >= 2 * k


def test_many_long_rows_are_sifted_and_few_are_cut() -> None:
    def best(rows: int, n: int) -> select.Config:
        return select.legal(rows=rows, n=n, k=2048, processors=132)[0]

    assert best(2048, 32768).sample and best(64, 131072).sample
    assert not best(1, 131072).sample and not best(4096, 8192).sample


# -- scores in chunks ---------------------------------------------------------------------------


def noted() -> tuple[list[tuple[list[int], int]], Any, Any]:
    """Steps that note the shapes of the scores asked for and their row stride; the selection of a
    row is its upper bound."""
    asked: list[tuple[list[int], int]] = []

    def scores(out: torch.Tensor, *_: Any) -> None:
        asked.append((list(out.shape), out.stride(0)))
        out.fill_(torch.nan)

    def choose(out: Any, logits: Any, k: int, starts: Any, ends: Any) -> None:
        assert logits.shape[0] == ends.shape[0] == out.shape[0]
        out.copy_(ends[:, None].expand(-1, k))

    return asked, scores, choose


@pytest.mark.parametrize(("context", "step"), [(8191, 32), (300001, 1), (100, 70)])
def test_a_chunk_stays_within_its_budget(context: int, step: int) -> None:
    """Every token once, in order; no more than 1 MiB of scores, or one row."""
    asked, scores, choose = noted()
    rows = torch.arange(70, dtype=torch.int32)
    q, k = torch.zeros(70, 1, 1), torch.zeros(context, 1)
    out = index_select.ragged(
        q, k, k[:, 0], q[:, 0], rows, rows, 3, logits_mb=1, scores=scores, select=choose
    )
    assert torch.equal(out, rows[:, None].expand(-1, 3))
    assert [shape[0] for shape, _ in asked] == [min(step, 70 - at) for at in range(0, 70, step)]
    assert all(shape[1] == context and stride % 16 == 0 for shape, stride in asked)


def test_requests_are_not_divided() -> None:
    asked, scores, choose = noted()
    lens = torch.arange(10, dtype=torch.int32).view(5, 2)
    out = index_select.paged(
        torch.zeros(5, 2, 1, 1), torch.zeros(1, 1, 1), torch.zeros(10, 1), lens,
        torch.zeros(5, 1, dtype=torch.int32), 4, layout="any", max_context_len=60000, logits_mb=1,
        scores=scores, select=choose,
    )  # fmt: skip
    assert torch.equal(out, lens.view(-1, 1).expand(-1, 4))
    assert [shape for shape, _ in asked] == [[4, 60000], [4, 60000], [2, 60000]]


# -- interpreted ----------------------------------------------------------------------------------

FORMS = ((512, 2, 0), (128, 1, 0), (128, 1, 16))
"""Held, warps, sample: a row in one piece, in many, and sifted."""


def kinds() -> dict[str, torch.Tensor]:
    """Scores [2, 400] of each kind that a form may stumble over."""
    torch.manual_seed(5)
    plain = torch.randn(2, 400)
    misleading = plain.clone()
    misleading[:, 32::64] += 10
    return {
        "plain": plain,
        "plateau": torch.where(torch.rand(2, 400) < 0.75, 0.0, plain),
        "zeros": torch.where(torch.rand(2, 400) < 0.5, -0.0, 0.0),
        "steps": plain.mul(2).round(),
        "rising": plain.sort(-1).values,
        "falling": plain.sort(-1, descending=True).values,
        "misleading": misleading,
        "holes": torch.where(torch.rand(2, 400) < 0.97, torch.nan, plain),
        "special": torch.where(torch.rand(2, 400) < 0.3, torch.inf, -plain.abs()),
        "tiny": plain * 1e-40,
        "bf16": plain.bfloat16(),
    }


def interpret() -> None:
    """As a process of its own: each form on each kind, against the reference; prints what was wrong
    and how many rows had to be searched whole."""
    from dsa_hal.backends.portable import interpreter

    interpreter.start()
    from dsa_hal.backends.portable._kernels import select as kernels
    from dsa_hal.ops.select import topk

    select.room = lambda k: 64  # type: ignore[assignment]
    wrong, whole = [], 0
    finish = kernels.finish

    class Counting:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **options: Any) -> None:
                nonlocal whole
                whole += int((args[5] > options["CAP"]).sum())
                finish[grid](*args, **options)

            return launch

    kernels.finish = Counting()
    ends = torch.tensor([399, 333], dtype=torch.int32)
    with use(target=stand_in("rocm:gfx950", "cpu")):
        for at, (name, scores) in enumerate(kinds().items()):
            k, starts, stops = ((23, None, None), (30, ends - 300, ends))[at % 2]
            want = topk.reference(scores, k, starts, stops, ties="lower").sort(-1).values
            for form in FORMS:
                with select.SPACE.forced(select.Config(*form)):
                    got = select.largest(scores, k, starts, stops)
                some = got >= 0
                order = bool((got[:, 1:] > got[:, :-1])[some[:, 1:]].all())
                last = not bool((~some[:, :-1] & some[:, 1:]).any())
                if not (torch.equal(got.sort(-1).values, want) and order and last):
                    wrong.append(f"{name} k={k} {form}")
    print(json.dumps({"wrong": wrong, "whole": whole}))


def test_every_form_selects_what_the_reference_does() -> None:
    """Ties to lower columns, columns ascending; and the search of whole rows, which a misleading
    sample makes necessary, was among what ran."""
    pytest.importorskip("triton")
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{here}:{here.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", "import test_portable_topk as t; t.interpret()"],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["wrong"] == []
    assert answer["whole"] > 0
