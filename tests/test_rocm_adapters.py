"""The adapter of AITER beside a stand-in with the signatures and habits of its sources, and the
layout of keys that it brings. No device has run it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import fake_libraries as fakes
import pytest
import torch

from dsa_hal import ops
from dsa_hal.backends.portable import library
from dsa_hal.backends.rocm._adapters import aiter  # noqa: F401, registers
from dsa_hal.case import Case, Inputs, Maker, case, copied, run, tree_map
from dsa_hal.errors import BadInput, ConfigError
from dsa_hal.matrix import Row, judge
from dsa_hal.ops.indexer import paged_inputs
from dsa_hal.ops.layout import KVLayout, convert, tiled, untiled
from dsa_hal.registry import Impl, Op
from dsa_hal.selection import Unsupported, use

ROWS, TILES = "index_fp8/128", "index_fp8_tiled/128"


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    library.imported.cache_clear()
    yield
    library.imported.cache_clear()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in fakes.aiter().items():
        parts = name.split(".")
        for depth in range(1, len(parts)):
            parent = ".".join(parts[:depth])
            monkeypatch.setitem(sys.modules, parent, fakes.module(__path__=[]))
        monkeypatch.setitem(sys.modules, name, module)


def adapter(op: Op[..., Any]) -> Impl[..., Any]:
    return op._impls["rocm/aiter"]


def outcome(op: Op[..., Any], row: Case) -> str:
    """ "ok", or the status and its reason."""
    with use(backend="cpu"):
        found = judge(Row(op, adapter(op), row))
    return found.status if found.status == "ok" else f"{found.status}: {found.detail}"


SERVED = [
    (ops.indexer_logits, dict(tokens=5, context=63, heads=32)),
    (ops.indexer_logits, dict(tokens=6, context=90, ranges="beyond")),
    (ops.indexer_logits, dict(tokens=6, context=90, ranges="empty")),
    (ops.indexer_logits, dict(tokens=9, context=300, ranges="ragged", dim=64)),
    (ops.indexer_logits, dict(tokens=3, context=0)),
    (ops.indexer_logits_paged, dict(batch=3, next_n=1, context=200, page_size=1)),
    (ops.indexer_logits_paged, dict(batch=2, next_n=3, context=90, page_size=1, heads=32)),
    (ops.indexer_logits_paged, dict(batch=2, next_n=1, context=0, page_size=1)),
    (ops.fp8_gemm, dict(m=5, n=256, k=384, fp32=False)),
    (ops.fp8_gemm, dict(m=0, n=128, k=128, fp32=False)),
]


@pytest.mark.parametrize(("op", "axes"), SERVED)
def test_serves(installed: None, op: Op[..., Any], axes: dict[str, Any]) -> None:
    assert outcome(op, Case("case", axes)) == "ok"


@pytest.mark.parametrize("row", [c for c in ops.topk.cases if not c.model], ids=lambda c: c.name)
def test_selects(installed: None, row: Case) -> None:
    assert outcome(ops.topk, row) == "ok"


def test_zeros_of_both_signs_are_equal(installed: None) -> None:
    scores = torch.tensor([[-0.0, 0.0, -1.0, 0.0]])
    assert adapter(ops.topk).fn(scores, 2, ties="lower").tolist() == [[0, 1]]


REFUSED = [
    (ops.indexer_logits, dict(tokens=2, context=9, heads=8), "8 heads"),
    (ops.indexer_logits, dict(tokens=2, context=9, kind="bf16"), "q is torch.bfloat16"),
    (ops.indexer_logits_paged, dict(batch=1, next_n=1, context=9, page_size=64), "hold 64 tokens"),
    (ops.indexer_logits_paged, dict(batch=1, next_n=1, context=9, kind="bf16"), "index_bf16"),
    (ops.fp8_gemm, dict(m=2, n=128, k=200, fp32=False), "k is 200"),
    (ops.fp8_gemm, dict(m=2, n=128, k=128, fp32=True), "out_dtype is torch.float32"),
]


@pytest.mark.parametrize(("op", "axes", "sentence"), REFUSED)
def test_refuses(installed: None, op: Op[..., Any], axes: dict[str, Any], sentence: str) -> None:
    assert sentence in outcome(op, Case("refused", axes))


def test_an_older_aiter_has_no_rule_for_ties(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def top_k_per_row_prefill(logits: Any, k: int = 2048) -> None: ...

    module = fakes.module(top_k_per_row_prefill=top_k_per_row_prefill)
    monkeypatch.setitem(sys.modules, "aiter.ops.topk", module)
    assert "no rule for ties" in outcome(ops.topk, case("any", rows=1, n=9, k=4))


def test_a_library_that_does_not_load_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiter", None)
    for op, axes in SERVED[::5]:
        assert "importing it raised" in outcome(op, Case("case", axes))


def test_gaps_in_the_last_axis_are_served(installed: None) -> None:
    def comb(_: str, t: torch.Tensor) -> torch.Tensor:
        return t.new_zeros((*t.shape[:-1], 2 * t.shape[-1]))[..., ::2].copy_(t)

    for op, axes in (*SERVED[::5], (ops.topk, dict(rows=7, n=90, k=20, ranges="ragged"))):
        inputs = op.inputs(Maker("cpu", 0), **axes)
        want = run(op.reference, copied(inputs), ())
        kept = {name: inputs[name] for name in ("pages",) if name in inputs}
        got = run(adapter(op).fn, {**tree_map(comb, inputs), **kept}, ())
        assert op.check(got, want, inputs).ok


BROUGHT = ("indexer_logits", "indexer_logits_paged", "topk", "fp8_gemm")


@pytest.mark.parametrize("op", BROUGHT)
def test_an_op_brings_its_adapter(op: str) -> None:
    """Selection imports an op's own file, and that one its adapter, which ranks apart from all."""
    module = importlib.import_module(f"dsa_hal.backends.rocm.{op}")
    assert hasattr(module, "aiter")
    ranks = [i.rank for i in getattr(ops, op)._impls.values() if i.backend == "rocm"]
    assert len(set(ranks)) == len(ranks) and min(ranks) == adapter(getattr(ops, op)).rank


# -- keys in squares ----------------------------------------------------------------------------


def pool(page_size: int) -> torch.Tensor:
    form = KVLayout.parse(ROWS)
    return Maker("cpu", 0).randint(0, 256, 3, page_size, form.record, dtype=torch.uint8)


@pytest.mark.parametrize("page_size", [16, 48, 64])
def test_squares_are_those_of_aiter(page_size: int) -> None:
    """Each byte where `shuffle_weight(keys, layout=(16, 16))` and `indexer_k_quant_and_cache` with
    preshuffle put it; scales stay."""
    before = pool(page_size)
    after = convert(before, ROWS, TILES)
    keys = before.view(3, -1)[:, : page_size * 128]
    # shuffle_weight's axes: (-1, tokens / 16, 16, elements / 32, 2, 16), permuted 0 1 3 4 2 5
    shuffled = keys.reshape(-1, page_size // 16, 16, 4, 2, 16).permute(0, 1, 3, 4, 2, 5)
    assert torch.equal(after.view(3, -1)[:, : page_size * 128], shuffled.reshape(3, -1))
    assert torch.equal(
        after.view(3, -1)[:, page_size * 128 :], before.view(3, -1)[:, page_size * 128 :]
    )
    token, element = page_size - 3, 77
    at = (token // 16) * 16 * 128 + (element // 16) * 256 + (token % 16) * 16 + element % 16
    assert torch.equal(after.view(3, -1)[:, at], before.view(3, -1)[:, token * 128 + element])
    assert torch.equal(convert(after, TILES, ROWS), before)


def test_squares_hold_what_rows_hold() -> None:
    form = KVLayout.parse(TILES)
    values = torch.randn(2, 32, 128, dtype=torch.bfloat16)
    wide = convert(values, "index_bf16/128", TILES)
    assert torch.equal(
        convert(wide, TILES, "index_fp32/128"),
        convert(convert(values, "index_bf16/128", ROWS), ROWS, "index_fp32/128"),
    )
    tokens = torch.arange(64).view(2, 32) % 5 == 0
    mask = form.mask(wide, tokens)
    assert torch.equal(untiled(mask, form), KVLayout.parse(ROWS).mask(wide, tokens))
    assert torch.equal(tiled(untiled(wide, form), form), wide)


def test_squares_are_refused_where_nothing_reads_them() -> None:
    pages = KVLayout.parse(TILES).empty(2, 32)
    with pytest.raises(BadInput, match="keeps keys in squares, which this op does not take"):
        ops.gather_index_key(pages, torch.zeros(1, dtype=torch.int32), layout=TILES)
    with pytest.raises(BadInput, match="`convert` makes it index_fp8/128"):
        KVLayout.parse(TILES).views(pages)
    with pytest.raises(BadInput, match="multiples of 16"):
        convert(pool(20), ROWS, TILES)
    with pytest.raises(ConfigError, match="multiples of 16"):
        KVLayout.parse("index_fp8_tiled/120")
    inputs = paged(batch=1, next_n=1, context=40, page_size=32)
    with use(backend="cpu"), pytest.raises(Unsupported, match="does not promise keys=tiled"):
        ops.indexer_logits_paged(**inputs)


def paged(**axes: Any) -> Inputs:
    """Inputs whose pool is in squares."""
    inputs = paged_inputs(Maker("cpu", 0), **axes)
    return {**inputs, "pages": convert(inputs["pages"], inputs["layout"], TILES), "layout": TILES}


@pytest.mark.parametrize(
    "axes",
    [
        dict(batch=3, next_n=1, context=200, page_size=64),
        dict(batch=2, next_n=2, context=90, page_size=16, heads=32),
        dict(batch=2, next_n=1, context=300, page_size=256, lengths="full"),
    ],
)
def test_scores_of_keys_in_squares(
    installed: None, monkeypatch: pytest.MonkeyPatch, axes: dict[str, Any]
) -> None:
    """Equal to the scores of the same keys in rows, under the matrix's twists."""
    op = ops.indexer_logits_paged
    want = op.reference(**op.inputs(Maker("cpu", 0), **axes))
    assert torch.equal(op.reference(**paged(**axes)), want)
    monkeypatch.setattr(op, "inputs", lambda make, **axes: paged(**axes))
    assert outcome(op, Case("squares", axes)) == "ok"


def test_a_pool_with_gaps_is_refused(installed: None) -> None:
    inputs = ops.indexer_logits_paged.inputs(Maker("cpu", 0), batch=1, next_n=1, context=40,
                                             page_size=1)  # fmt: skip
    room = torch.zeros(2 * inputs["pages"].shape[0], 1, 132, dtype=torch.uint8)[::2]
    inputs["pages"] = room.copy_(inputs["pages"])
    with pytest.raises(BadInput, match="a pool without gaps"):
        adapter(ops.indexer_logits_paged).fn(**inputs)
