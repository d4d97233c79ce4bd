"""The indexer's scores on NVIDIA GPUs, as far as a machine without one can tell: which
configurations fit a multiprocessor, and which calls each kernel takes."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from foreign import foreign

from dsa_hal.backends.cuda import indexer_logits as ragged
from dsa_hal.backends.cuda import indexer_logits_paged as paged
from dsa_hal.backends.portable import indexer_logits as portable
from dsa_hal.ops.layout import KVLayout
from dsa_hal.registry import Impl
from dsa_hal.selection import OPS

SHARED = 227 << 10
"""Bytes of shared memory that a block of Hopper can have."""

REGISTERS = 64 << 10


def own(op: str, name: str) -> Impl[..., Any]:
    """An implementation, whatever machine this is."""
    importlib.import_module(f"dsa_hal.backends.cuda.{op}")
    return OPS[op]._impls[f"cuda/{name}"]


def fit(warpgroups: int, held: int) -> bool:
    """Whether a computing thread's registers hold so many numbers, beside 16 others; the kernels
    leave 40 to each thread of the warpgroup that copies."""
    each = min(255, (REGISTERS - 128 * 40) // (128 * warpgroups) // 8 * 8)
    return held + 16 <= each


@pytest.mark.parametrize("heads", [32, 64])
def test_blocks_of_queries_fit_a_multiprocessor(heads: int) -> None:
    found = ragged.legal(heads=heads)
    assert found and len(set(found)) == len(found)
    for config in found:
        assert ragged.shared_bytes(config) <= SHARED
        rows, rest = divmod(ragged.COLUMNS, heads)
        assert rest == 0 and rows <= 32, "a warp's lanes look at the ranges of a block's rows"


@pytest.mark.parametrize("columns", [32, 64, 96, 128, 192, 256, 320, 384])
def test_blocks_for_a_request_fit_a_multiprocessor(columns: int) -> None:
    found = paged.legal(columns=columns)
    assert found and len(set(found)) == len(found)
    for config in found:
        assert paged.shared_bytes(config, columns) <= SHARED
        assert config.stages % config.wgs == 0, "warpgroups take turns at the stages"
        if columns <= 128:
            assert fit(config.wgs, columns // 2 + columns // 4)


@pytest.mark.parametrize("op", ["indexer_logits", "indexer_logits_paged"])
def test_triton_refuses_no_case_and_cuda_says_which(op: str) -> None:
    """Cases of int8 are both's to refuse."""
    taken = set()
    for case in OPS[op].cases:
        inputs = case.make(OPS[op].inputs, "meta")
        assert (own(op, "triton").why_not(**inputs) is None) != foreign(case), case.name
        if own(op, "cuda").why_not(**inputs) is None:
            taken.add(case.name)
        elif case.model:
            pytest.fail(f"{case.name} is a shape of the model")
    others = {"one", "bf16", "fp32"} | (
        {"head64"} if op == "indexer_logits" else {"page1", "page3"}
    )
    assert taken == {case.name for case in OPS[op].cases if not foreign(case)} - others


def test_what_the_kernels_cannot_read_is_refused_in_words() -> None:
    q = torch.empty(4, 48, 128, dtype=torch.float8_e4m3fn, device="meta")
    k = torch.empty(100, 128, dtype=torch.float8_e4m3fn, device="meta")
    one = torch.empty(100, device="meta")
    said = ragged.scores_why_not(q, k, one, torch.empty(4, 48, device="meta"), one[:4], one[:4])
    assert "48" in str(said)
    layout = "index_fp8/128"
    for next_n, page_size, number in ((7, 64, "7"), (2, 24, "24"), (1, 4, "4")):
        q = torch.empty(3, next_n, 64, 128, dtype=torch.float8_e4m3fn, device="meta")
        pages = KVLayout.parse(layout).empty(5, page_size, "meta")
        said = paged.scores_why_not(
            q, pages, one, one, one, layout=layout, max_context_len=page_size
        )
        assert number in str(said)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("heads", "dim"), [(8, 64), (32, 128), (64, 128), (128, 192), (3, 40)])
def test_triton_tiles_are_powers_of_two_that_cover(heads: int, dim: int, size: int) -> None:
    sizes = portable.blocks(heads, dim)
    assert sizes["BH"] * sizes["HEAD_BLOCKS"] >= heads > sizes["BH"] * (sizes["HEAD_BLOCKS"] - 1)
    assert sizes["BD"] >= dim
    for tokens in (1, 16, 4096):
        found = portable.legal(tokens=tokens, heads=heads, dim=dim, bytes=size)
        assert found and len(set(found)) == len(found)
        numbers = [n for c in found for n in (c.keys, c.rows, c.warps)]
        for number in [*numbers, sizes["BH"], sizes["BD"]]:
            assert number & (number - 1) == 0
