"""Adapters keep our contracts beside libraries that have others: every generation's conventions
are played by stand-ins, under the matrix's own twists."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fake_libraries as fakes
import pytest
import torch

from dsa_hal import ops
from dsa_hal.backends.cuda._adapters import cublas, deepgemm, flashinfer, flashmla
from dsa_hal.backends.portable import library
from dsa_hal.case import Case, Inputs, Maker, case, copied, run, tree_map
from dsa_hal.matrix import Row, judge
from dsa_hal.registry import Impl, Op
from dsa_hal.selection import _missing, use

LATENT = dict(heads=64, dim=576, dim_v=512)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No library is remembered from test to test, and streams need no device."""

    def forget() -> None:
        for found in (library.imported, flashmla._generation, deepgemm._generation):
            found.cache_clear()
        flashmla._plans.clear()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    forget()
    yield
    forget()


def install(monkeypatch: pytest.MonkeyPatch, name: str, module: Any) -> None:
    parent = name.partition(".")[0]
    if parent != name:
        monkeypatch.setitem(sys.modules, parent, fakes.module(__path__=[]))
    monkeypatch.setitem(sys.modules, name, module)


def adapter(op: Op[..., Any], name: str) -> Impl[..., Any]:
    return op._impls[f"cuda/{name}"]


def outcome(op: Op[..., Any], name: str, row: Case) -> str:
    """ "ok", or the status and its reason."""
    with use(backend="cpu"):
        found = judge(Row(op, adapter(op, name), row))
    return found.status if found.status == "ok" else f"{found.status}: {found.detail}"


PREFILLS = (
    case("plain", tokens=3, context=200, k=128, **LATENT),
    case("odd_k", tokens=5, context=90, k=67, pattern="holes", **LATENT),
    case("no_key", tokens=4, context=90, k=64, pattern="alternate", **LATENT),
    case("short", tokens=5, context=150, k=96, short=True, **LATENT),
    case("sink", tokens=4, context=90, k=64, sink=True, pattern="alternate", **LATENT),
    case("empty", tokens=0, context=64, k=64, **LATENT),
    case("no_context", tokens=3, context=0, k=64, causal=False, **LATENT),
)
DECODES = (
    case("plain", batch=3, next_n=1, context=200, heads=64, k=64),
    case("next_2", batch=2, next_n=2, context=200, heads=64, k=67, pattern="holes"),
    case("short", batch=3, next_n=2, context=200, heads=64, k=96, short=True),
    case("sink", batch=3, next_n=1, context=90, heads=64, k=64, sink=True, pattern="alternate"),
    case("plan", batch=2, next_n=2, context=200, heads=64, k=128, workers=5),
    case("empty", batch=0, next_n=1, context=64, heads=64, k=64),
)
GENERATIONS = {
    "2025": fakes.flash_mla_2025,
    "2026": lambda: fakes.flash_mla_2026(fork=False),
    "sgl": lambda: fakes.flash_mla_2026(fork=True),
}


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("row", [*PREFILLS, *DECODES], ids=lambda r: f"{len(r.axes)}-{r.name}")
def test_flash_mla(monkeypatch: pytest.MonkeyPatch, generation: str, row: Case) -> None:
    install(monkeypatch, "flash_mla.flash_mla_interface", GENERATIONS[generation]())
    op = ops.sparse_mla if row in PREFILLS else ops.sparse_mla_paged
    assert outcome(op, "flashmla", row) == "ok"


def test_flash_mla_keeps_a_plan_for_its_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_mla.flash_mla_interface", fakes.flash_mla_2026(fork=True))
    for batch in (1, 2, 1):
        row = case("plain", batch=batch, next_n=1, context=100, heads=64, k=64)
        assert outcome(ops.sparse_mla_paged, "flashmla", row) == "ok"
    assert len(flashmla._plans) == 2
    kept = set(map(id, flashmla._plans.values()))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    shapes = next(iter(flashmla._plans))[:-1]
    own = flashmla._plan(fakes.flash_mla_2026(fork=True), shapes)
    assert id(own) not in kept and len(flashmla._plans) == 2, "a graph's plan is the graph's"


REFUSED = [
    (ops.sparse_mla, dict(tokens=2, context=9, heads=16, k=8), "16 heads; FlashMLA"),
    (ops.sparse_mla, dict(tokens=2, context=9, heads=64, k=8, dtype="fp32"), "q is torch.float32"),
    (ops.sparse_mla, dict(tokens=2, context=9, heads=64, k=8, dim=40, dim_v=32), "dim_v is 32"),
    (ops.sparse_mla_paged,
     dict(batch=1, next_n=1, context=9, heads=64, k=8, layout="latent_bf16/512+64"),
     "the cache is latent_bf16/512+64"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "axes", "sentence"), REFUSED)
def test_flash_mla_refuses(
    monkeypatch: pytest.MonkeyPatch, op: Op[..., Any], axes: dict[str, Any], sentence: str
) -> None:
    install(monkeypatch, "flash_mla.flash_mla_interface", fakes.flash_mla_2026(fork=True))
    assert sentence in outcome(op, "flashmla", Case("refused", axes))


def test_flash_mla_without_hopper_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fakes.flash_mla_2026(fork=False)

    def decode(enable_batch_invariant: bool = False) -> None: ...

    monkeypatch.setattr(library, "flash_mla_with_kvcache", decode)
    install(monkeypatch, "flash_mla.flash_mla_interface", library)
    assert "no kernels for Hopper" in outcome(ops.sparse_mla, "flashmla", PREFILLS[0])


def test_a_library_that_does_not_load_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    row = case("plain", m=3, n=128, k=128, fp32=False)
    assert "importing it raised" in outcome(ops.fp8_gemm, "deepgemm", row)


PRODUCTS = [
    (ops.fp8_gemm, dict(m=5, n=192, k=256, fp32=False)),
    (ops.fp8_gemm, dict(m=0, n=128, k=128, fp32=False)),
    (ops.grouped_fp8_gemm, dict(m=300, groups=3, n=64, k=128, align=128, fp32=False)),
    (ops.grouped_fp8_gemm, dict(m=65, groups=4, n=64, k=128, align=16, fp32=False)),
    (ops.grouped_fp8_gemm, dict(m=40, groups=8, n=64, k=128, align=1, fp32=False)),
    (ops.grouped_fp8_gemm, dict(m=0, groups=2, n=64, k=128, align=1, fp32=False)),
    (ops.grouped_fp8_gemm_masked, dict(max_m=13, groups=3, n=64, k=128, fp32=False)),
    (ops.grouped_fp8_gemm_masked, dict(max_m=128, groups=2, n=64, k=256, fp32=False)),
]


@pytest.mark.parametrize(("op", "axes"), PRODUCTS)
def test_deep_gemm_products(
    monkeypatch: pytest.MonkeyPatch, op: Op[..., Any], axes: dict[str, Any]
) -> None:
    install(monkeypatch, "deep_gemm", fakes.deep_gemm(year=2026))
    assert outcome(op, "deepgemm", Case("case", axes)) == "ok"


def test_rows_of_groups_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract takes layouts whose groups are scattered; the library does not."""
    install(monkeypatch, "deep_gemm", fakes.deep_gemm(year=2026))
    op = ops.grouped_fp8_gemm
    inputs = op.inputs(Maker("cpu", 0), m=40, groups=3, n=64, k=128, align=1, fp32=False)
    inputs["grouped_layout"] = torch.arange(40, dtype=torch.int32) % 4 - 1
    found = adapter(op, "deepgemm").fn(**inputs)
    assert op.check((found,), (op.reference(**inputs),), inputs).ok


SCORES = [
    (ops.indexer_logits, dict(tokens=5, context=63, heads=32), (2025, 2026)),
    (ops.indexer_logits, dict(tokens=6, context=90, ranges="beyond"), (2026,)),
    (ops.indexer_logits, dict(tokens=9, context=80, ranges="ragged", dim=64), (2026,)),
    (ops.indexer_logits, dict(tokens=3, context=0), (2026,)),
    (ops.indexer_logits_paged, dict(batch=3, next_n=1, context=200), (2025, 2026)),
    (ops.indexer_logits_paged, dict(batch=2, next_n=3, context=130, heads=32), (2026,)),
    (ops.indexer_logits_paged, dict(batch=2, next_n=1, context=0), (2026,)),
]


@pytest.mark.parametrize(
    ("op", "axes", "year"), [(op, axes, year) for op, axes, years in SCORES for year in years]
)
def test_deep_gemm_scores(
    monkeypatch: pytest.MonkeyPatch, op: Op[..., Any], axes: dict[str, Any], year: int
) -> None:
    install(monkeypatch, "deep_gemm", fakes.deep_gemm(year=year))
    assert outcome(op, "deepgemm", Case("case", axes)) == "ok"


@pytest.mark.parametrize(
    ("op", "axes", "sentence"),
    [
        (ops.fp8_gemm, dict(m=2, n=128, k=200, fp32=False), "k is 200"),
        (ops.fp8_gemm, dict(m=2, n=128, k=128, fp32=True), "out_dtype is torch.float32"),
        (ops.grouped_fp8_gemm, dict(m=2, groups=2, n=65, k=128, align=1, fp32=False), "n is 65"),
        (ops.indexer_logits, dict(tokens=2, context=9, heads=8), "8 heads"),
        (ops.indexer_logits, dict(tokens=2, context=9, kind="bf16"), "q is torch.bfloat16"),
        (ops.indexer_logits_paged, dict(batch=1, next_n=1, context=9, page_size=16), "pages hold"),
        (ops.indexer_logits_paged, dict(batch=1, next_n=2, context=70), "next_n is 2"),
        (ops.indexer_logits_paged, dict(batch=1, next_n=1, context=9, kind="bf16"), "index_bf16"),
    ],
)
def test_deep_gemm_refuses(
    monkeypatch: pytest.MonkeyPatch, op: Op[..., Any], axes: dict[str, Any], sentence: str
) -> None:
    install(monkeypatch, "deep_gemm", fakes.deep_gemm(year=2025))
    assert sentence in outcome(op, "deepgemm", Case("refused", axes))


@pytest.mark.parametrize("row", [c for c in ops.topk.cases if not c.model], ids=lambda c: c.name)
def test_flashinfer(monkeypatch: pytest.MonkeyPatch, row: Case) -> None:
    install(monkeypatch, "flashinfer", fakes.flashinfer())
    assert row.axes["k"] <= flashinfer.MAX_K
    assert outcome(ops.topk, "flashinfer", row) == "ok"


def test_flashinfer_refuses_large_k(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flashinfer", fakes.flashinfer())
    assert "k is 4000" in outcome(ops.topk, "flashinfer", case("k", rows=1, n=9, k=4000))


@pytest.mark.parametrize(
    "row", [c for c in ops.fp8_gemm.cases if not c.model], ids=lambda c: c.name
)
def test_cublas(monkeypatch: pytest.MonkeyPatch, row: Case) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", fakes.scaled_mm)
    found = outcome(ops.fp8_gemm, cublas.product.__module__.rpartition(".")[2], row)
    whole = row.axes["k"] % 128 == 0 and row.axes["n"] % 16 == 0
    assert found == "ok" if whole else "refused" in found


def combed(inputs: Inputs) -> Inputs:
    """Views whose last axis has gaps, but for the cache."""

    def comb(_: str, t: torch.Tensor) -> torch.Tensor:
        return t.new_zeros((*t.shape[:-1], 2 * t.shape[-1]))[..., ::2].copy_(t)

    return {**tree_map(comb, inputs), **{k: v for k, v in inputs.items() if k == "pages"}}


@pytest.mark.parametrize(
    ("op", "name", "axes"),
    [
        (ops.sparse_mla, "flashmla", dict(tokens=4, context=150, k=96, short=True, **LATENT)),
        (ops.sparse_mla, "flashmla", dict(tokens=4, context=90, k=64, sink=True, **LATENT)),
        (ops.sparse_mla_paged, "flashmla",
         dict(batch=2, next_n=2, context=90, heads=64, k=64, short=True, sink=True)),
        (ops.fp8_gemm, "deepgemm", dict(m=5, n=192, k=256, fp32=False)),
        (ops.fp8_gemm, "cublas", dict(m=5, n=192, k=256, fp32=False)),
        (ops.grouped_fp8_gemm, "deepgemm",
         dict(m=65, groups=4, n=64, k=128, align=16, fp32=False)),
        (ops.grouped_fp8_gemm_masked, "deepgemm",
         dict(max_m=13, groups=3, n=64, k=128, fp32=False)),
        (ops.indexer_logits, "deepgemm", dict(tokens=9, context=80, ranges="ragged")),
        (ops.indexer_logits_paged, "deepgemm", dict(batch=3, next_n=2, context=200)),
        (ops.topk, "flashinfer", dict(rows=7, n=90, k=20, ranges="ragged")),
    ],
)  # fmt: skip
def test_gaps_in_the_last_axis_are_served(
    monkeypatch: pytest.MonkeyPatch, op: Op[..., Any], name: str, axes: dict[str, Any]
) -> None:
    install(monkeypatch, "flash_mla.flash_mla_interface", fakes.flash_mla_2026(fork=True))
    install(monkeypatch, "deep_gemm", fakes.deep_gemm(year=2026))
    install(monkeypatch, "flashinfer", fakes.flashinfer())
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", fakes.scaled_mm)
    inputs = op.inputs(Maker("cpu", 0), **axes)
    want = run(op.reference, copied(inputs), ())
    got = run(adapter(op, name).fn, combed(inputs), ())
    assert op.check(got, want, inputs).ok


BROUGHT = {
    "topk": ["flashinfer"], "sparse_mla": ["flashmla"], "sparse_mla_paged": ["flashmla"],
    "fp8_gemm": ["cublas", "deepgemm"], "grouped_fp8_gemm": ["deepgemm"],
    "grouped_fp8_gemm_masked": ["deepgemm"], "indexer_logits": ["deepgemm"],
    "indexer_logits_paged": ["deepgemm"],
}  # fmt: skip


@pytest.mark.parametrize("op", BROUGHT)
def test_an_op_brings_its_adapters(op: str) -> None:
    """Selection imports an op's own file, and that one its adapters, which rank apart from all."""
    module = importlib.import_module(f"dsa_hal.backends.cuda.{op}")
    assert [name for name in BROUGHT[op] if hasattr(module, name)] == BROUGHT[op]
    ranks = [i.rank for i in getattr(ops, op)._impls.values() if i.backend == "cuda"]
    assert len(set(ranks)) == len(ranks), "which of two equals is asked first, imports decide"


def test_a_need_may_name_alternatives() -> None:
    assert _missing("torch>=2 | no-such-package") is None
    assert _missing("no-such-package | torch>=2") is None
    both = _missing("no-such-package>=1 | torch>=99")
    assert both is not None and "no-such-package is not installed" in both and "torch" in both
