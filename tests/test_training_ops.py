"""The ops of training beyond the matrix: true gradients, bounded memory, differentiable faces, the
bodies of other devices on the processor's tensors, and which backend "auto" takes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import foreign
from oracle import one_thread
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from dsa_hal import target
from dsa_hal.backends.portable.chunks import Chunk, Limits, of_ranges, of_selection
from dsa_hal.backends.portable.indexer import divergence
from dsa_hal.backends.portable.sparse_mla import backward
from dsa_hal.case import Inputs, case, run, tree_map
from dsa_hal.errors import Absent, BadInput
from dsa_hal.matrix import DEFAULT_RUN, Row, cost_of, judge
from dsa_hal.ops import autograd as faces
from dsa_hal.ops.attention import sparse_mla
from dsa_hal.ops.training import (
    indexer_divergence,
    indexer_kl,
    sparse_attention,
    sparse_mla_bwd,
)
from dsa_hal.registry import Op
from dsa_hal.selection import OPS, Selection, use
from dsa_hal.target import Target

GPU = Target("cuda", "sm90", "cuda")
"""A target that need not be here: its plain-torch bodies take tensors of any device."""


@pytest.fixture(autouse=True)
def on_the_processor() -> Any:
    with use(backend="cpu"):
        yield


def inputs_of(op: Op[..., Any], name: str) -> Inputs:
    return next(case for case in op.cases if case.name == name).make(op.inputs)


# -- gradients are true --------------------------------------------------------------------------

INDICES = torch.tensor([[4, 1, 0], [-1, -1, -1], [2, -1, 5], [-1, 3, -1]])


def double(*shape: int) -> Tensor:
    made = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return made.requires_grad_()


def test_the_reference_of_attention_passes_gradcheck() -> None:
    def attention(q: Tensor, kv: Tensor) -> Tensor:
        return sparse_attention(q, kv, INDICES, softmax_scale=0.7, dim_v=3)

    assert torch.autograd.gradcheck(attention, (double(4, 2, 5), double(6, 5)))


def test_the_reference_of_the_loss_passes_gradcheck() -> None:
    q, kv = double(4, 2, 5).detach(), double(6, 5).detach()
    column = torch.arange(6)
    ranges = (column >= torch.tensor([[0], [3], [2], [5]])) & (
        column < torch.tensor([[6], [3], [4], [6]])
    )

    def dense(q_index: Tensor, k_index: Tensor, weights: Tensor) -> Tensor:
        return indexer_divergence(q_index, k_index, weights, q, kv, ranges, softmax_scale=0.7)

    def chosen(q_index: Tensor, k_index: Tensor, weights: Tensor) -> Tensor:
        at = INDICES.clamp(min=0)
        return indexer_divergence(
            q_index, k_index[at], weights, q, kv[at], INDICES >= 0, softmax_scale=0.7
        )

    leaves = double(4, 3, 7), double(6, 7), double(4, 3)
    assert torch.autograd.gradcheck(dense, leaves)
    assert torch.autograd.gradcheck(chosen, leaves)
    assert dense(*leaves)[1] == 0 and chosen(*leaves)[1] == 0
    assert bool((dense(*leaves)[[0, 2]] > 1e-3).all())


EXACT = {
    "stretch": Limits(workspace=1 << 15, launch=0, gather=10**9),
    "gathered": Limits(workspace=1 << 15, launch=0, gather=0),
    "both, large": Limits(workspace=1 << 26, launch=1 << 20, gather=8),
}


@pytest.mark.parametrize("limits", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize(
    ("op", "name"),
    [
        (sparse_mla_bwd, "small"),
        (sparse_mla_bwd, "fp32"),
        (indexer_kl, "small"),
        (indexer_kl, "sparse_small"),
    ],
    ids=["attention", "attention_long", "dense", "sparse"],
)
def test_fp32_gradients_are_those_of_fp64(op: Op[..., Any], name: str, limits: Limits) -> None:
    inputs = inputs_of(op, name)
    exact = tree_map(lambda _, t: t.double() if t.is_floating_point() else t, inputs)
    inputs.pop("deterministic", None)
    body = backward if op is sparse_mla_bwd else divergence
    results = body(**inputs, limits=limits)  # type: ignore[operator]
    for got, want in zip(results, op.reference(**exact), strict=True):
        assert want.dtype == torch.float64
        error = float((got.double() - want).abs().max() / want.abs().max())
        assert error < 3e-6


def test_a_loss_is_0_where_the_indexer_knows_the_target() -> None:
    """One head whose products are positive, and the attention's scale for a weight."""
    q, kv = torch.rand(9, 1, 40), torch.rand(30, 40)
    ks, ke = torch.arange(9).int(), torch.arange(9).int() * 3 + 1
    weights = torch.full((9, 1), 0.3)
    loss, *gradients = indexer_kl(q, kv, weights, q, kv, ks, ke, softmax_scale=0.3)
    assert float(loss.abs().max()) < 1e-6
    assert all(float(g.abs().max()) < 1e-5 for g in gradients)
    loss, *gradients = indexer_kl(q, kv, -weights, q, kv, ks, ke, softmax_scale=0.3)
    assert float(loss[3:].min()) > 1e-3 and all(bool(g.any()) for g in gradients)


def test_a_query_without_keys_has_neither_loss_nor_gradient() -> None:
    inputs = inputs_of(indexer_kl, "sparse_none")
    loss, dq_index, _, dweights = indexer_kl(**inputs)
    empty = (inputs["indices"] < 0).all(-1)
    assert 0 < int(empty.sum()) < len(empty)
    for result in (loss, dq_index, dweights):
        assert not result[empty].any() and result[~empty].any()
    inputs = inputs_of(sparse_mla_bwd, "no_key")
    empty = (inputs["indices"] < 0).all(-1)
    dq, _ = sparse_mla_bwd(**inputs)
    assert not dq[empty].any() and dq[~empty].any()


@pytest.mark.parametrize(
    ("op", "name", "place", "value", "found"),
    [
        (sparse_mla_bwd, "odd_k", (3, 5), 300, r"indices \[3, 5\] is 300"),
        (sparse_mla_bwd, "odd_k", (2, 0), -2, r"indices \[2, 0\] is -2"),
        (indexer_kl, "sparse", (3, 5), 300, r"indices \[3, 5\] is 300"),
    ],
)
def test_a_value_out_of_range_is_named(
    op: Op[..., Any], name: str, place: Any, value: int, found: str
) -> None:
    inputs = inputs_of(op, name)
    inputs["indices"][place] = value
    with pytest.raises(BadInput, match=found):
        op(**inputs)


def test_keys_are_allowed_by_ranges_or_by_indices() -> None:
    inputs = inputs_of(indexer_kl, "small")
    chosen = torch.zeros(19, 3, dtype=torch.int32)
    for change, found in (
        (dict(ke=None), "of ks, ke and indices ks came"),
        (dict(indices=chosen), "of ks, ke and indices ks, ke, indices came"),
        (dict(ks=None, ke=None), "of ks, ke and indices none came"),
        (dict(row_weight=torch.ones(3)), r"row_weight has shape \[3\]; expected \[19\]"),
    ):
        with pytest.raises(BadInput, match=found):
            indexer_kl(**{**inputs, **change})


# -- memory --------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that owns memory among all that an op returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and not func.is_view:
                self.bytes = max(self.bytes, t.numel() * t.element_size())
        return out


@pytest.mark.parametrize("picked", [0, 64], ids=["dense", "sparse"])
def test_no_tensor_is_larger_than_the_workspace(picked: int) -> None:
    """Neither [tokens, keys, heads] nor [tokens, k, dim] exists."""
    sizes = dict(tokens=3000, context=3000, heads=4, dim=40)
    room = 8 << 20
    calls: list[tuple[Op[..., Any], Inputs]] = [
        (indexer_kl, dict(**sizes, k=picked, index_heads=6, index_dim=24)),
    ]
    if picked:
        calls.append((sparse_mla_bwd, dict(**sizes, k=picked, dim_v=32)))
        assert 3 * room < 3000 * picked * 40 * 4
    else:
        assert 3 * room < 3000 * 3000 * 4 * 4
    for op, axes in calls:
        inputs = case("large", **axes).make(op.inputs)
        given = [t.nbytes for t in inputs.values() if isinstance(t, Tensor)]
        with Largest() as seen:
            results = run(op.select(**inputs).fn, inputs, ())
        assert 0 < seen.bytes <= max(room, *given, *(r.nbytes for r in results))


def test_chunks_hold_every_query_once_and_fit() -> None:
    generator = torch.Generator().manual_seed(5)
    limits = Limits(workspace=1 << 16, launch=1 << 12, gather=40)
    for tokens, context, k in ((1, 1, 1), (63, 40, 5), (64, 900, 3), (500, 4000, 7)):
        ids = torch.randint(-context, context, (tokens, k), generator=generator).clamp(-1).int()
        ids[::5] = -1
        ids[tokens // 2 :] //= 50  # some near each other, some far
        found = of_selection(ids, context, heads=2, score=8, picked=100, limits=limits, asked="ids")
        covered(found, ids.masked_fill(ids < 0, context).amin(1), ids.amax(1) + 1)
        for chunk in found:
            rows = chunk.end - chunk.start
            size = rows * k * 100 if chunk.gathered else chunk.area * 8
            assert rows == 1 or size <= limits.workspace
        if tokens == 500:
            assert {chunk.gathered for chunk in found} == {False, True}
        first, last = ids.amin(1).clamp(0), ids.amax(1) + 1
        covered(of_ranges(first, last, context, heads=2, score=8, limits=limits), first, last)


def covered(found: list[Chunk], first: Tensor, last: Tensor) -> None:
    """Queries with keys lie in one chunk each, between whose bounds all their keys are."""
    times = torch.zeros(len(first), dtype=torch.int32)
    for chunk in found:
        times[chunk.rows] += 1
        full = (first < last)[chunk.rows]
        assert bool((first[chunk.rows][full] >= chunk.low).all())
        assert bool((last[chunk.rows][full] <= chunk.high).all())
    assert int(times.max()) <= 1
    assert bool((times[first < last] == 1).all())


# -- bodies of another device ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "impl"),
    [
        ("indexer_logits", "torch"),
        ("topk", "torch"),
    ],
)
def test_plain_torch_for_gpus_holds_on_the_processors_tensors(name: str, impl: str) -> None:
    """The matrix on bodies that make every tensor where their arguments lie; bf16 is rounded where
    it would be, but summed by the processor, which repeats its sums on one thread alone."""
    op = OPS[name]
    (found,) = [i for i in op.implementations(GPU) if (i.backend, i.name) == ("cuda", impl)]
    small = [case for case in op.cases if DEFAULT_RUN.admits(cost_of(op, case))]
    served = [case for case in small if not foreign(case)]
    assert len(served) > 10
    with one_thread():
        for chosen in served:
            outcome = judge(Row(op, found, chosen))
            assert outcome.status == "ok", f"{chosen.name}: {outcome}"


@pytest.mark.parametrize("op", [sparse_mla_bwd, indexer_kl], ids=lambda op: op.name)
def test_determinism_is_served_by_a_promise(op: Op[..., Any]) -> None:
    pytest.importorskip("triton")
    inputs = inputs_of(op, "far" if op is sparse_mla_bwd else "sparse_far")
    plain, strict = Selection(GPU), Selection(GPU, deterministic=True)

    def able(chosen: Selection) -> list[str]:
        return [v.impl.name for v in chosen.verdicts(op, (), inputs) if v.question == "ok"]

    assert able(plain) == ["triton", "triton_ordered"]
    assert able(strict) == ["triton_ordered"]
    if op is sparse_mla_bwd:
        verdicts = plain.verdicts(op, (), {**inputs, "deterministic": True})
        refusals = {v.impl.name: v.reason for v in verdicts if v.question == "promise"}
        assert refusals["triton"] == "does not promise deterministic, which was asked for"
        assert "triton_ordered" not in refusals


# -- differentiable faces -------------------------------------------------------------------------


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def selected(tokens: int, context: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randperm(context, generator=generator)[:k] for _ in range(tokens)]
    ids = torch.stack(rows).int()
    ids[1], ids[3, 2:] = -1, -1
    return ids


def dense_attention(q: Tensor, kv: Tensor, ids: Tensor, scale: float, dim_v: int) -> Tensor:
    """The same attention with a mask over all keys."""
    mask = torch.zeros(len(q), len(kv) + 1, dtype=torch.bool)
    mask.scatter_(1, torch.where(ids < 0, len(kv), ids).long(), True)
    mask = mask[:, None, :-1]
    weights = (q @ kv.T * scale).masked_fill(~mask, -1e30).softmax(-1) * mask
    return weights @ kv[:, :dim_v]


@pytest.mark.parametrize("face", ["function", "torch.ops"])
def test_attention_is_differentiable(face: str) -> None:
    q, kv = leaves((9, 3, 40), (30, 40))
    ids = selected(9, 30, 7)
    if face == "function":
        out, lse = faces.sparse_mla(q, kv, ids, softmax_scale=0.2, dim_v=32)
    else:
        out, _, lse = torch.ops.dsa_hal.sparse_mla(q, kv, ids, softmax_scale=0.2, dim_v=32)
    want = dense_attention(q, kv, ids, 0.2, 32)
    torch.testing.assert_close(out, want)
    got = torch.autograd.grad(out.sin().sum(), (q, kv))
    torch.testing.assert_close(got, torch.autograd.grad(want.sin().sum(), (q, kv)))
    assert not lse.requires_grad and lse[1].isinf().all()


def test_the_gradient_has_the_dtype_of_its_argument() -> None:
    inputs = inputs_of(sparse_mla_bwd, "odd_k")
    q, kv = (inputs[name].requires_grad_() for name in ("q", "kv"))
    out, _ = faces.sparse_mla(q, kv, inputs["indices"], softmax_scale=inputs["softmax_scale"])
    dq, dkv = torch.autograd.grad(out, (q, kv), inputs["dout"])
    want = sparse_mla_bwd.reference(**inputs)
    assert dq.dtype == dkv.dtype == torch.bfloat16
    assert sparse_mla_bwd.check((dq, dkv.float()), want, inputs).ok


def test_the_backward_is_chosen_where_the_forward_ran() -> None:
    """Backward runs in threads of its own and after `use()`: neither changes the choice."""
    q, kv = leaves((9, 3, 40), (30, 40))
    ids = selected(9, 30, 7)
    with use(sparse_mla_bwd="reference"):
        out, lse = faces.sparse_mla(q, kv, ids, softmax_scale=0.2, dim_v=32)
    got = torch.autograd.grad(out, (q, kv), torch.ones_like(out))
    given = q.detach(), kv.detach(), ids, out.detach(), lse, torch.ones_like(out)
    want = sparse_mla_bwd.reference(*given, softmax_scale=0.2, dim_v=32)
    other = sparse_mla_bwd(*given, softmax_scale=0.2, dim_v=32)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert not all(torch.equal(o, w) for o, w in zip(other, want, strict=True))
    with torch.no_grad(), use(sparse_mla_bwd="absent"):
        faces.sparse_mla(q.detach(), kv.detach(), ids, softmax_scale=0.2, dim_v=32)


def test_other_runtimes_can_trace_the_gradient() -> None:
    q, kv = leaves((9, 3, 40), (30, 40))
    ids = selected(9, 30, 7)
    torch.library.opcheck(
        torch.ops.dsa_hal.sparse_mla.default, (q, kv, ids), dict(softmax_scale=0.2, dim_v=32)
    )
    sink = torch.zeros(3)
    with pytest.raises(BadInput, match="attn_sink was given and a gradient is wanted"):
        torch.ops.dsa_hal.sparse_mla(q, kv, ids, softmax_scale=0.2, dim_v=32, attn_sink=sink)
    with torch.no_grad():
        out, _, _ = torch.ops.dsa_hal.sparse_mla(
            q, kv, ids, softmax_scale=0.2, dim_v=32, attn_sink=sink
        )
    given = q.detach(), kv.detach(), ids
    assert torch.equal(out, sparse_mla(*given, softmax_scale=0.2, dim_v=32, attn_sink=sink)[0])


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_the_loss_is_differentiable(stage: str) -> None:
    """Against torch's own kl_div on masked scores of all keys."""
    q_index, k_index, weights, q, kv = leaves((9, 4, 24), (30, 24), (9, 4), (9, 3, 40), (30, 40))
    ids = selected(9, 30, 7)
    ks, ke = torch.arange(9).int(), torch.arange(9).int() * 4 - 3
    column = torch.arange(30)
    if stage == "dense":
        keys: dict[str, Any] = dict(ks=ks, ke=ke)
        mask = (column >= ks[:, None]) & (column < ke[:, None])
    else:
        keys = dict(indices=ids)
        mask = (column[:, None] == ids[:, None]).any(-1)
    row_weight = torch.rand(9)
    loss = faces.indexer_kl(
        q_index, k_index, weights, q, kv, **keys, row_weight=row_weight, softmax_scale=0.2
    )
    scores = torch.einsum("thd,sd->ths", q_index, k_index).relu().mul(weights[..., None]).sum(1)
    log = scores.masked_fill(~mask, -1e30).log_softmax(-1)
    target = (q @ kv.T * 0.2).masked_fill(~mask[:, None], -1e30).softmax(-1).mean(1).detach()
    rows = (functional.kl_div(log, target, reduction="none") * mask).sum(-1)
    rows = rows.masked_fill(~mask.any(-1), 0)
    want = (rows * row_weight).sum()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    index = q_index, k_index, weights
    got = torch.autograd.grad(0.3 * loss, index, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(0.3 * want, index), rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(loss, (q, kv), allow_unused=True) == (None, None)


# -- which backend "auto" takes -------------------------------------------------------------------


def test_auto_wants_all_that_a_model_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts make up for a composite's own file, nothing for a missing part, and training is not
    asked for."""
    whole = frozenset(
        op.name for op in OPS.values() if op.kind == "primitive" and op.family != "training"
    )
    files = {"cpu": whole, "cuda": whole - {"topk"}, "rocm": whole, "npu": frozenset[str]()}
    monkeypatch.setattr(target, "packages", lambda: {b: (b,) for b in files})
    scores = {"cpu": 0, "cuda": 100, "rocm": 50, "npu": 200}
    monkeypatch.setattr(target, "probe", lambda b: Target(b, "x", score=scores[b]))
    monkeypatch.setattr(target, "implements", lambda b: files[b])
    assert target.detect("auto").backend == "rocm"
    assert target.detect("cuda").backend == "cuda"
    files["cuda"] = whole
    assert target.detect("auto").backend == "cuda"
    files.update(dict.fromkeys(files, frozenset({"topk"})))
    with pytest.raises(Absent, match=r"no backend can serve this machine .*cuda: it has no "):
        target.detect("auto")
    monkeypatch.setattr(target, "packages", lambda: {"npu": ("npu",)})
    assert target.detect("auto").backend == "npu"  # alone, it is not asked


def test_a_partial_backend_serves_those_who_ask_for_it(tmp_path: Path) -> None:
    package = tmp_path / "abacus"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from dsa_hal.target import Target\n"
        "def target(): return Target('abacus', 'wood', 'cpu', 'Abacus 2', score=500)\n"
    )
    (package / "quantize_fp8.py").write_text(
        "from dsa_hal.ops.quant import quantize_fp8\n"
        "@quantize_fp8.impl('abacus', 'beads', contract=1)\n"
        "def quantize(x, *, group=128, block_rows=1, pow2=True):\n"
        "    return x, x\n"
    )
    info = tmp_path / "abacus-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: abacus\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[dsa_hal.backends]\nabacus = abacus\n")
    code = """
        import dsa_hal, torch
        for backend in (None, "abacus"):
            with dsa_hal.use(**({"backend": backend} if backend else {})):
                print(dsa_hal.ops.quantize_fp8.select(torch.ones(1, 128)).label)
        with dsa_hal.use(backend="abacus"):
            try:
                dsa_hal.ops.topk(torch.ones(1, 8), 2)
            except dsa_hal.DsaHalError as error:
                print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent,
        env={"PATH": os.defpath, "HOME": "/nonexistent", "PYTHONPATH": str(tmp_path),
             "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    automatic, asked, refused = done.stdout.splitlines()
    assert automatic == "cpu/torch" and asked == "abacus/beads"
    assert refused.startswith("topk on abacus:wood: backend abacus has no implementation of it")
