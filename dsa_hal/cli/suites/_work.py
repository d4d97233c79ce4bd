"""The workloads of the H200's table: an op, a shape, and how some of its rows are judged alone.

A reference computes a few rows where all would take it minutes: each row of these ops is a result
of its own, so rows taken from a whole result are judged like the result of a smaller call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsa_hal import ops
from dsa_hal.case import Inputs
from dsa_hal.registry import Op

ROWS = 64
"""Rows judged of each result, the first and the last among them."""

SELECTED, SLOTS = 2048, 64

Results = Sequence[Tensor]


@dataclass(frozen=True)
class Group:
    """Shapes whose ratios are averaged, and the ratio to the best peer that they shall reach."""

    name: str
    bar: float | None = None


@dataclass(frozen=True)
class Work:
    """One line of the table.

    rate   "bf16" or "fp8": what the device's arithmetic is compared with
    rows   how (inputs, at) becomes the inputs of rows `at`, [n] int64; None = all rows are judged
    taken  how (results, at) becomes their results; None = `at` of every result
    count  argument whose first axis are the rows
    alone  whether rows are judged by a call of their own, since a result sums over all rows
    recorded  whether a call is timed within a recording of many, as in a decode step, and not alone
    """

    group: Group
    op: Op[..., Any]
    label: str
    axes: Mapping[str, Any]
    rate: str
    rows: Callable[[Inputs, Tensor], Inputs] | None = None
    taken: Callable[[Results, Tensor], Results] | None = None
    count: str = "q"
    alone: bool = False
    recorded: bool = False

    def sample(self, inputs: Inputs) -> Tensor | None:
        """Which rows to judge, evenly spaced; None = all."""
        if self.rows is None:
            return None
        rows: Tensor = inputs[self.count]
        count = rows.shape[0]
        steps = torch.linspace(0, count - 1, min(count, ROWS), device=rows.device)
        found: Tensor = torch.unique(steps.long())
        return found


def _by(*names: str) -> Callable[[Inputs, Tensor], Inputs]:
    """Rows `at` of the arguments named that are tensors."""

    def rows(inputs: Inputs, at: Tensor) -> Inputs:
        own = {n: inputs[n] for n in names if isinstance(inputs[n], Tensor)}
        return {**inputs, **{name: tensor[at] for name, tensor in own.items()}}

    return rows


def _requests(inputs: Inputs, at: Tensor) -> Inputs:
    """Requests `at` of the paged scores; weights have a row per query of a request."""
    batch = inputs["q"].shape[0]
    weights = inputs["weights"].unflatten(0, (batch, -1))[at].flatten(0, 1)
    return {**_by("q", "context_lens", "block_table")(inputs, at), "weights": weights}


def _request_rows(next_n: int) -> Callable[[Results, Tensor], Results]:
    return lambda results, at: [r.unflatten(0, (-1, next_n))[at].flatten(0, 1) for r in results]


PREFILL = Group("sparse MLA prefill", 0.7)
DECODE = Group("sparse MLA decode", 0.8)
BACKWARD = Group("sparse MLA backward")
LOGITS = Group("indexer logits", 0.8)
PAGED = Group("paged logits", 0.9)
TOPK = Group("top-k", 1.5)
INDEXER_TOPK = Group("logits then top-k", 1.2)
GEMM_SMALL = Group("FP8 GEMM, decode-shaped", 1.2)
GEMM_ALONE = Group("FP8 GEMM, decode-shaped, one call")
GEMM_LARGE = Group("FP8 GEMM, large", 0.75)
GROUPED = Group("grouped FP8 GEMM", 0.75)


def workloads() -> list[Work]:
    """All lines, in the order of the table."""
    return [*_attention(), *_indexer(), *_products()]


def _k(count: int) -> str:
    return f"{count // 1024}K" if count >= 1024 else str(count)


def _attention() -> list[Work]:
    lines = [
        Work(PREFILL, ops.sparse_mla, f"4096 queries, h{heads}, {_k(context)} keys",
             dict(tokens=4096, context=context, heads=heads, k=SELECTED, causal=False), "bf16",
             _by("q", "indices", "topk_length"))
        for context, heads in ((8192, 128), (32768, 128), (131072, 128), (32768, 64))
    ]  # fmt: skip
    lines += [
        Work(DECODE, ops.sparse_mla_paged, f"batch {batch}, {next_n} queries, h{heads}",
             dict(batch=batch, next_n=next_n, context=32768, heads=heads, k=SELECTED, full=True,
                  page_size=SLOTS), "bf16", _by("q", "indices", "topk_length"))
        for batch, next_n, heads in (
            (1, 1, 128), (16, 1, 128), (64, 1, 128), (128, 1, 128), (128, 2, 128), (128, 1, 64)
        )
    ]  # fmt: skip
    lines.append(
        Work(BACKWARD, ops.sparse_mla_bwd, "4096 queries, h64, 8K keys",
             dict(tokens=4096, context=8192, heads=64, k=SELECTED), "bf16",
             _by("q", "indices", "out", "lse", "dout", "topk_length"), alone=True)
    )  # fmt: skip
    return lines


def _indexer() -> list[Work]:
    lines = [
        Work(LOGITS, ops.indexer_logits, f"{tokens} x {_k(context)}",
             dict(tokens=tokens, context=context), "fp8", _by("q", "weights", "ks", "ke"))
        for tokens, context in ((2048, 8192), (4096, 32768), (2048, 131072))
    ]  # fmt: skip
    lines += [
        Work(PAGED, ops.indexer_logits_paged, f"batch {batch} x {_k(context)}, next_n {next_n}",
             dict(batch=batch, next_n=next_n, context=context, lengths="full", page_size=SLOTS),
             "fp8", _requests, _request_rows(next_n))
        for batch, context, next_n in ((64, 8192, 1), (128, 32768, 1), (64, 65536, 2))
    ]  # fmt: skip
    lines += [
        Work(TOPK, ops.topk, f"{rows} x {_k(n)}", dict(rows=rows, n=n, k=SELECTED), "bf16",
             _by("logits", "starts", "ends"), count="logits")
        for rows, n in ((1, 131072), (64, 32768), (128, 65536), (2048, 32768), (2048, 131072))
    ]  # fmt: skip
    lines.append(
        Work(INDEXER_TOPK, ops.indexer_topk, "4096 x 32K",
             dict(tokens=4096, context=32768, topk=SELECTED), "fp8",
             _by("q", "weights", "ks", "ke"))
    )  # fmt: skip
    return lines


def _products() -> list[Work]:
    rows = _by("a", "a_scale")
    few = ((64, 2112, 7168), (64, 7168, 2048), (128, 24576, 1536))
    many = (
        (4096, 2112, 7168), (4096, 24576, 1536), (4096, 7168, 16384), (4096, 4096, 7168),
        (4096, 7168, 2048),
    )  # fmt: skip
    lines = [
        Work(group, ops.fp8_gemm, f"m{m} n{n} k{k}", dict(m=m, n=n, k=k, fp32=False), "fp8", rows,
             count="a", recorded=group is GEMM_SMALL)
        for group, shapes in ((GEMM_SMALL, few), (GEMM_ALONE, few), (GEMM_LARGE, many))
        for m, n, k in shapes
    ]  # fmt: skip
    lines += [
        Work(GROUPED, ops.grouped_fp8_gemm, f"g{groups} m{m} n{n} k{k}",
             dict(m=groups * m, groups=groups, n=n, k=k, align=128, fp32=False), "fp8",
             _by("a", "a_scale", "grouped_layout"), count="a")
        for groups, m, n, k in (
            (8, 4096, 4096, 7168), (8, 4096, 7168, 2048), (32, 256, 4096, 7168),
            (32, 256, 7168, 2048),
        )
    ]  # fmt: skip
    lines += [
        Work(GROUPED, ops.grouped_fp8_gemm_masked, f"masked g32 m64 n{n} k{k}",
             dict(max_m=64, groups=32, n=n, k=k, fp32=False), "fp8")
        for n, k in ((4096, 7168), (7168, 2048))
    ]  # fmt: skip
    return lines


def inputs_of(work: Work, maker: Any) -> Inputs:
    """The arguments, changed where an op's own cases are more crooked than the table's shapes:
    every group of a grouped product gets as many rows, and none are padding."""
    inputs = work.op.inputs(maker, **work.axes)
    if "grouped_layout" in inputs:
        groups, m = work.axes["groups"], work.axes["m"]
        layout = torch.arange(groups, device=maker.device, dtype=torch.int32)
        inputs["grouped_layout"] = layout.repeat_interleave(m // groups)
    if "masked_m" in inputs:
        inputs["masked_m"] = torch.full_like(inputs["masked_m"], work.axes["max_m"])
    return inputs
