"""dsa_hal inside other programs: torch.compile, writes that compilers must keep, other threads."""

from __future__ import annotations

import threading
from typing import Any

import torch

import dsa_hal
from dsa_hal.ops.cache import store_index_key
from dsa_hal.ops.layout import KVLayout
from dsa_hal.ops.norm import rms_norm
from dsa_hal.ops.select import topk


def test_ops_compile_into_one_graph() -> None:
    """No graph break, also where the number of tokens changes between calls."""

    def step(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scores = torch.ops.dsa_hal.rms_norm(x, weight) @ x.T
        return torch.ops.dsa_hal.topk(scores, 3)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    weight = torch.ones(16)
    for tokens in (5, 9):
        x = torch.randn(tokens, 16)
        assert torch.equal(compiled(x, weight), topk(rms_norm(x, weight) @ x.T, 3))


def test_writes_into_caches_survive_compilation() -> None:
    layout = KVLayout.parse("index_fp8/128")

    def step(pages: torch.Tensor, k: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        torch.ops.dsa_hal.store_index_key(pages, k * 2, slots, layout=layout.spec)
        return pages.sum()

    k, slots = torch.randn(3, 128), torch.tensor([0, 5, 2], dtype=torch.int32)
    eager, compiled = layout.empty(2, 4, "cpu"), layout.empty(2, 4, "cpu")
    store_index_key(eager, k * 2, slots, layout=layout.spec)
    torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, k, slots)
    assert torch.equal(compiled, eager) and bool(eager.any())


def test_an_explicit_choice_stays_in_its_thread() -> None:
    seen: dict[str, Any] = {}

    def work() -> None:
        seen["other"] = topk.select(torch.randn(1, 4), 2).label

    with dsa_hal.use(topk="reference"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        seen["here"] = topk.select(torch.randn(1, 4), 2).label
    assert seen["here"] == "reference/reference" and seen["other"] != seen["here"]
