"""Libraries called the way their own users call them: plans made and scales laid out before the
clock starts, no conversion to our contracts. The adapters, which do convert, stand beside them in
every table, and in `backends/cuda/_adapters`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dsa_hal.case import Inputs
from dsa_hal.cli.suites._race import Contender

LIBRARIES = {
    "FlashMLA": "flash_mla",
    "DeepGEMM": "deep_gemm",
    "FlashInfer": "flashinfer",
    "TileLang": "tilelang",
}
"""Peers by the module that must be found; cuBLAS comes with torch."""


def absent() -> list[str]:
    return [name for name, module in LIBRARIES.items() if find_spec(module) is None]


def peers(op: str, inputs: Inputs) -> Iterator[Contender]:
    """Every library present that computes `op`, prepared for these inputs."""
    for library, makers in _MAKERS.get(op, ()):
        if library == "cuBLAS" or find_spec(LIBRARIES[library]) is not None:
            yield from makers(inputs)


def _clean(logits: Tensor, ks: Tensor, ke: Tensor) -> tuple[Tensor]:
    """Scores with -inf outside each row's range, where libraries leave garbage."""
    column = torch.arange(logits.shape[1], device=logits.device)
    return (logits.masked_fill((column < ks[:, None]) | (column >= ke[:, None]), -torch.inf),)


# -- FlashMLA -----------------------------------------------------------------------------------


def _flash_mla() -> tuple[ModuleType, dict[str, Any]]:
    import flash_mla.flash_mla_interface as module

    fork = "use_legacy" in module.flash_mla_sparse_fwd.__code__.co_varnames
    return module, {"use_legacy": True} if fork else {}


def _prefill(inputs: Inputs) -> Iterator[Contender]:
    module, legacy = _flash_mla()

    def fn(q: Tensor, kv: Tensor, indices: Tensor, softmax_scale: float) -> Any:
        return module.flash_mla_sparse_fwd(q, kv, indices, softmax_scale, **legacy)

    own = {
        "q": inputs["q"], "kv": inputs["kv"][:, None], "indices": inputs["indices"][:, None],
        "softmax_scale": inputs["softmax_scale"],
    }  # fmt: skip
    yield Contender("FlashMLA", fn, own, peer=True)


def _decode(inputs: Inputs) -> Iterator[Contender]:
    module, legacy = _flash_mla()
    plan = module.get_mla_metadata()[0]

    def fn(q: Tensor, pages: Tensor, indices: Tensor, softmax_scale: float) -> Any:
        return module.flash_mla_with_kvcache(
            q, pages, None, None, 512, plan, softmax_scale=softmax_scale, is_fp8_kvcache=True,
            indices=indices, **legacy,
        )  # fmt: skip

    pages = inputs["pages"].view(torch.float8_e4m3fn)[:, :, None]
    own = {"q": inputs["q"], "pages": pages, "indices": inputs["indices"],
           "softmax_scale": inputs["softmax_scale"]}  # fmt: skip
    yield Contender("FlashMLA", fn, own, peer=True)


# -- DeepGEMM and cuBLAS ------------------------------------------------------------------------


def _laid_out(scale: Tensor) -> Tensor:
    """a's scales as DeepGEMM's kernels read them: columns dense, 16 bytes aligned."""
    import deep_gemm

    found: Tensor = deep_gemm.get_mn_major_tma_aligned_tensor(scale)
    return found


def _products(kind: str, inputs: Inputs) -> Iterator[Contender]:
    """DeepGEMM with a's scales as the op has them, and laid out before."""
    import deep_gemm

    shape = (*inputs["a"].shape[:-1], inputs["b"].shape[-2])
    out = torch.empty(shape, dtype=torch.bfloat16, device=inputs["a"].device)

    def fn(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, rows: Any) -> Tensor:
        if kind == "dense":
            deep_gemm.fp8_gemm_nt((a, a_scale), (b, b_scale), out)
        elif kind == "contiguous":
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous((a, a_scale), (b, b_scale), out, rows)
        else:
            run = getattr(deep_gemm, "m_grouped_fp8_gemm_nt_masked", None)
            run = run or deep_gemm.fp8_m_grouped_gemm_nt_masked
            run((a, a_scale), (b, b_scale), out, rows, shape[1])
        return out

    def zeroed(found: Tensor) -> tuple[Tensor]:
        if kind == "dense":
            return (found,)
        layout = inputs.get("grouped_layout")
        if layout is not None:
            return (found.masked_fill(layout[:, None] < 0, 0),)
        row = torch.arange(found.shape[1], device=found.device)
        return (found.masked_fill((row >= inputs["masked_m"][:, None])[..., None], 0),)

    rows = {"dense": None, "contiguous": "grouped_layout", "masked": "masked_m"}[kind]
    own = {name: inputs[name] for name in ("a", "a_scale", "b", "b_scale")}
    own["rows"] = None if rows is None else inputs[rows]
    yield Contender("DeepGEMM", fn, own, peer=True, results=zeroed)
    # Copies for cold caches would lose the layout: the scales are small, and one serves them all.
    scale = _laid_out(inputs["a_scale"])
    rest = {name: value for name, value in own.items() if name != "a_scale"}

    def prepared(**given: Any) -> Tensor:
        return fn(a_scale=scale, **given)

    yield Contender("DeepGEMM, scales laid out", prepared, rest, peer=True, results=zeroed)


def _cublas(inputs: Inputs) -> Iterator[Contender]:
    from torch.nn.functional import ScalingType, scaled_mm

    a_scale = inputs["a_scale"].t().contiguous().t()
    b_scale = torch.nn.functional.pad(inputs["b_scale"], (0, -inputs["b_scale"].shape[1] % 4)).t()

    def fn(a: Tensor, b: Tensor) -> Tensor:
        return scaled_mm(
            a, b.t(), a_scale, ScalingType.BlockWise1x128, b_scale, ScalingType.BlockWise128x128,
            output_dtype=torch.bfloat16,
        )  # fmt: skip

    own = {"a": inputs["a"], "b": inputs["b"]}
    yield Contender("cuBLAS, scales laid out", fn, own, peer=True)


def _logits(inputs: Inputs) -> Iterator[Contender]:
    import deep_gemm

    def fn(q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor) -> Any:
        return deep_gemm.fp8_mqa_logits(q, (k, k_scale), weights, ks, ke, clean_logits=False)

    yield Contender(
        "DeepGEMM", fn, inputs, peer=True,
        results=lambda found: _clean(found, inputs["ks"], inputs["ke"]),
    )  # fmt: skip


def _paged_logits(inputs: Inputs) -> Iterator[Contender]:
    import deep_gemm

    lengths, width = inputs["context_lens"], inputs["max_context_len"]
    schedule = deep_gemm.get_paged_mqa_logits_metadata(
        lengths, inputs["pages"].shape[1], deep_gemm.get_num_sms()
    )

    def fn(q: Tensor, pages: Tensor, weights: Tensor, table: Tensor) -> Any:
        return deep_gemm.fp8_paged_mqa_logits(
            q, pages, weights, lengths, table, schedule, width, clean_logits=False
        )

    own = {"q": inputs["q"], "pages": inputs["pages"][:, :, None], "weights": inputs["weights"],
           "table": inputs["block_table"]}  # fmt: skip
    ends = lengths.reshape(-1)
    yield Contender(
        "DeepGEMM", fn, own, peer=True,
        results=lambda found: _clean(found, torch.zeros_like(ends), ends),
    )  # fmt: skip


# -- FlashInfer ---------------------------------------------------------------------------------


@contextmanager
def _algorithm(name: str | None) -> Iterator[None]:
    """FlashInfer's own choice, or the backend it is forced to take."""
    before = os.environ.pop("FLASHINFER_TOPK_ALGO", None)
    if name is not None:
        os.environ["FLASHINFER_TOPK_ALGO"] = name
    try:
        yield
    finally:
        os.environ.pop("FLASHINFER_TOPK_ALGO", None)
        if before is not None:
            os.environ["FLASHINFER_TOPK_ALGO"] = before


FLASHINFER = {"FlashInfer": None, "FlashInfer, CUB": "cub", "FlashInfer, radix": "default"}
"""Its dispatch was tuned on another GPU: its backends are timed one by one as well."""


def _columns(found: Tensor) -> tuple[Tensor]:
    return (found.to(torch.int32),)


def _top_k(inputs: Inputs) -> Iterator[Contender]:
    import flashinfer

    rows, n = inputs["logits"].shape
    starts = torch.zeros(rows, dtype=torch.int32, device=inputs["logits"].device)
    ends = starts + n if inputs["ends"] is None else inputs["ends"]
    for name, algorithm in FLASHINFER.items():

        def fn(logits: Tensor, algorithm: str | None = algorithm) -> Any:
            with _algorithm(algorithm):
                return flashinfer.top_k_ragged_transform(logits, starts, ends, inputs["k"])

        yield Contender(name, fn, {"logits": inputs["logits"]}, peer=True, results=_columns)


def _torch_top_k(inputs: Inputs) -> Iterator[Contender]:
    def fn(logits: Tensor) -> Any:
        return torch.topk(logits, inputs["k"], sorted=False)[1]

    yield Contender("torch.topk", fn, {"logits": inputs["logits"]}, peer=True, results=_columns)


def _logits_then_top_k(inputs: Inputs) -> Iterator[Contender]:
    import deep_gemm

    if find_spec(LIBRARIES["FlashInfer"]) is None:
        return
    import flashinfer

    # FlashInfer reads whole rows, of which DeepGEMM's matrix has the last one cut off: one more
    # query, which sees nothing, stands behind the others.
    own = {n: torch.cat([inputs[n], torch.zeros_like(inputs[n][:1])]) for n in ("weights", "ke")}
    own["q"] = torch.cat([inputs["q"], inputs["q"][:1]])
    own |= {name: inputs[name] for name in ("k", "k_scale")}
    starts, rows = torch.zeros_like(own["ke"]), inputs["q"].shape[0]
    for name, algorithm in FLASHINFER.items():

        def fn(
            q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ke: Tensor,
            algorithm: str | None = algorithm,
        ) -> Any:  # fmt: skip
            logits = deep_gemm.fp8_mqa_logits(
                q, (k, k_scale), weights, starts, ke, clean_logits=False
            )
            width = logits.stride(0)
            with _algorithm(algorithm):
                return flashinfer.top_k_ragged_transform(
                    logits.as_strided((rows, width), (width, 1)), starts[:rows], ke[:rows],
                    inputs["topk"],
                )  # fmt: skip

        yield Contender(f"DeepGEMM + {name}", fn, own, peer=True, results=_columns)


Maker = Callable[[Inputs], Iterator[Contender]]

_MAKERS: dict[str, tuple[tuple[str, Maker], ...]] = {
    "sparse_mla": (("FlashMLA", _prefill),),
    "sparse_mla_paged": (("FlashMLA", _decode),),
    "fp8_gemm": (("DeepGEMM", lambda i: _products("dense", i)), ("cuBLAS", _cublas)),
    "grouped_fp8_gemm": (("DeepGEMM", lambda i: _products("contiguous", i)),),
    "grouped_fp8_gemm_masked": (("DeepGEMM", lambda i: _products("masked", i)),),
    "indexer_logits": (("DeepGEMM", _logits),),
    "indexer_logits_paged": (("DeepGEMM", _paged_logits),),
    "topk": (("FlashInfer", _top_k), ("cuBLAS", _torch_top_k)),
    "indexer_topk": (("DeepGEMM", _logits_then_top_k),),
}
