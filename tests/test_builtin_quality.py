"""How good the built-in model's sparse attention is, on text that it was not trained on: the report
on windows of its full context. Fails if the indexer selects badly, and proves that it would: random
keys in its place must do visibly worse."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dsa_hal.model.builtin import HELDOUT, builtin_checkpoint
from dsa_hal.model.quality.perplexity import Perplexity
from dsa_hal.model.quality.report import Quality, measure, plan, subject

CONTEXT = 4096
CLOSE = 1.01
"""Times the perplexity that DSA may have of dense attention's, and FP8 of the unquantised."""

BROKEN = 10
"""Times the perplexity that random keys must at least have of the indexer's."""

HELD, HELD_BY_LATEST = 0.90, 0.50
"""Share of the attention mass: at least for the selected keys, below for as many latest ones."""

Lines = dict[tuple[str, str], Perplexity]


def measured(parts: Sequence[str], windows: int) -> Quality:
    folder = builtin_checkpoint()
    asked = subject(folder)
    wanted = plan(
        asked, folder / HELDOUT, parts=parts, context=CONTEXT, windows=windows, seed=0,
        lengths=(CONTEXT // 2,), depths=(0, 25, 50, 75, 100), samples=1,
    )  # fmt: skip
    return measure(asked, wanted)


@pytest.fixture(scope="module")
def quality() -> Quality:
    return measured(("perplexity", "needle"), windows=1)


@pytest.fixture(scope="module")
def lines(quality: Quality) -> Lines:
    return {(line.weights, line.selector): line for line in quality.perplexity}


def test_dsa_predicts_as_well_as_dense_attention(lines: Lines) -> None:
    whole, late = lines["unquantised", "dsa"] / lines["unquantised", "dense"]
    assert whole <= CLOSE and late <= CLOSE


def test_fp8_predicts_as_well_as_unquantised_weights(lines: Lines) -> None:
    whole, _ = lines["fp8", "dsa"] / lines["unquantised", "dsa"]
    assert whole <= CLOSE


def test_random_keys_break_it(lines: Lines) -> None:
    """The first keys of a window are seen by every selector: the last quarter shows the gap."""
    _, late = lines["unquantised", "random"] / lines["unquantised", "dsa"]
    assert late >= BROKEN


def test_the_selected_keys_hold_the_attention_mass() -> None:
    """Windows differ, so it takes the mean of three: one alone may be mostly local."""
    held = measured(("recall",), windows=3).recall
    assert held is not None and held.queries == 3 * (CONTEXT - held.topk)
    assert held.whole.best >= held.whole.selected >= HELD
    assert held.whole.recent < HELD_BY_LATEST


def test_needles_are_found_by_selection_alone(quality: Quality) -> None:
    found = {needles.selector: needles.share for needles in quality.needles}
    assert found["dsa"] > found["random"]
    assert found["dsa"] >= found["dense"] - 0.2
