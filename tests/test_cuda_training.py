"""Training on NVIDIA GPUs, as far as it shows without one: who serves which case, tiles, and
programs whose work comes in several helpings, under Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from foreign import foreign

from dsa_hal.backends.cuda import indexer_kl as cuda_indexer_kl
from dsa_hal.backends.cuda import sparse_mla_bwd as cuda_sparse_mla_bwd
from dsa_hal.backends.portable import indexer_kl as portable_kl
from dsa_hal.backends.portable import sparse_mla_bwd as portable_bwd
from dsa_hal.ops.absorbed import mla_attention
from dsa_hal.ops.attention import sparse_mla
from dsa_hal.ops.training import indexer_kl, sparse_mla_bwd
from dsa_hal.registry import Impl, Op
from dsa_hal.selection import COMPOSITE
from dsa_hal.target import Target

H200 = Target("cuda", "sm90", "meta", "NVIDIA H200")
OPS = (sparse_mla, sparse_mla_bwd, indexer_kl, mla_attention)
SHARED = 227 << 10
"""Bytes of shared memory that a block of Hopper has."""


def serving(op: Op[..., Any], case: str) -> list[str]:
    """The implementations that take a case, best first."""
    (made,) = (c.make(op.inputs, "meta") for c in op.cases if c.name == case)
    wanted = op.requests(**made) if op.requests is not None else frozenset()
    found: tuple[Impl[..., Any], ...] = op.implementations(H200)
    return [
        i.name for i in found
        if i.backend != "reference" and wanted <= i.promises and i.why_not(**made) is None
    ]  # fmt: skip


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_own_kernels_serve_every_case(op: Op[..., Any]) -> None:
    """But factors of two dtypes, which a call has to widen first: the composite op's body does; and
    pools for devices of another kind."""
    names = [case.name for case in op.cases if case.name != "fp32_weight" and not foreign(case)]
    own = {n: [i for i in serving(op, n) if i.startswith(("triton", "cuda"))] for n in names}
    assert [name for name, found in own.items() if not found] == []
    if op is mla_attention:
        assert serving(op, "fp32_weight") == [COMPOSITE]


def test_determinism_is_served_by_sums_in_order() -> None:
    assert serving(sparse_mla_bwd, "train_8k") == ["triton", "triton_ordered"]
    assert serving(sparse_mla_bwd, "fp32") == ["triton", "triton_ordered"]
    assert serving(sparse_mla_bwd, "deterministic") == ["triton_ordered"]
    for op in (sparse_mla_bwd, indexer_kl):
        promises = {i.name: i.promises for i in op.implementations(H200)}
        assert not promises["triton"] and promises["triton_ordered"] == {"deterministic"}


def test_a_refusal_names_what_was_found() -> None:
    assert "torch.float64" in str(portable_bwd.why_not(torch.float64))
    q_index, q = torch.empty(3, 2, 512), torch.empty(3, 2, 576)
    assert "512" in str(portable_kl.why_not(q_index, q))
    assert "torch.float64" in str(portable_kl.why_not(q_index[..., :64], q.double()))
    assert portable_kl.why_not(q_index[..., :64], q) is None


# -- tiles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bytes", [2, 4])
@pytest.mark.parametrize("heads", [1, 8, 16, 32, 33, 64, 100, 128])
def test_tiles_fit_shared_memory(heads: int, bytes: int) -> None:
    """Operands of every stage of a step's loop, and what a step holds beside it."""
    for step in ("weigh", "pull", "push"):
        for t in getattr(cuda_sparse_mla_bwd, f"_{step}")(None, heads=heads, bytes=bytes):
            stage = {
                "weigh": (2 * t.heads + t.keys) * t.columns,
                "pull": t.heads * t.keys + t.keys * t.columns,
                "push": t.heads * (t.keys + t.columns),
            }[step]
            assert t.stages * stage * bytes <= SHARED, (step, t)
            assert t.heads <= max(16, 2 * heads)
    for t in cuda_indexer_kl._attend(None, heads=heads, width=576, bytes=bytes):
        assert t.stages * (t.heads + t.keys) * t.columns * bytes <= SHARED
    for t in cuda_indexer_kl._index(None, heads=heads, width=128, bytes=bytes):
        assert (t.heads + t.stages * t.keys) * 128 * bytes + t.heads * t.keys * bytes <= SHARED


# -- programs, interpreted -----------------------------------------------------------------------

HELPINGS = """
    import torch
    from dsa_hal.backends.portable import interpreter
    interpreter.start()
    from dsa_hal.backends.portable import indexer_kl, sparse_attention, sparse_mla_bwd
    from dsa_hal.case import case as made_by
    from dsa_hal.ops.attention import sparse_mla
    from dsa_hal.ops import training
    from dsa_hal.selection import use

    def case(op, name):
        return next(c for c in op.cases if c.name == name).make(op.inputs)

    def judge(op, inputs, want, once, what):
        made = once()
        report = op.check(made, want, inputs)
        assert report.ok, f"{what}: {report}"
        with interpreter.backwards():
            again = once()
        assert all(map(torch.equal, made, again)), f"{what}: order shows"

    def loss():
        shape = dict(index_heads=3, index_dim=24, dim=40, dtype="fp32", weighted=True)
        many = made_by("many", tokens=5, context=70, heads=70, ranges="ragged", **shape)
        for name, size, inputs in (
            ("dense", 4096, case(training.indexer_kl, "small")),
            ("sparse", 2048, case(training.indexer_kl, "sparse_small")),
            ("heads of one query", 30000, many.make(training.indexer_kl.inputs)),
        ):
            want = training.indexer_kl.reference(**inputs)
            once = lambda: indexer_kl.divergence(
                **inputs, repeats=True, precision="ieee", workspace=size
            )
            judge(training.indexer_kl, inputs, want, once, name)

    def backward():
        inputs = case(training.sparse_mla_bwd, "short_holes")
        want = training.sparse_mla_bwd.reference(**inputs)
        inputs.pop("deterministic")
        once = lambda: sparse_mla_bwd.differentiated(
            **inputs, repeats=True, precision="ieee", workspace=2000
        )
        judge(training.sparse_mla_bwd, inputs, want, once, "backward")

    def forward():
        inputs = case(sparse_mla, "small")
        inputs["attn_sink"] = torch.linspace(-3, 3, inputs["q"].shape[1])
        inputs["topk_length"] = torch.arange(len(inputs["q"]), dtype=torch.int32) % 23
        want = sparse_mla.reference(**inputs)
        sparse_attention.WORKSPACE = 3000
        once = lambda: sparse_attention.attended(**inputs, precision="ieee")
        judge(sparse_mla, inputs, want, once, "forward")

    with use(backend="cpu"):
        {what}()
"""


@pytest.mark.parametrize("what", ["loss", "backward", "forward"])
def test_work_in_several_helpings(what: str) -> None:
    """Queries some at a time: right; programs in the other order: the same to the bit."""
    pytest.importorskip("triton")
    code = textwrap.dedent(HELPINGS).replace("{what}", what)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
