"""Attention, indexer and caches of the npu backend, run on emulated ops: what the matrix does not
show. Most of its cases have layouts or page sizes that the kernels refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from ci.ascend.emulated import emulated
from dsa_hal import use
from dsa_hal.backends.npu import _attention, _slots
from dsa_hal.case import Maker, case
from dsa_hal.matrix import Row, attempt
from dsa_hal.ops.absorbed import mla_attention
from dsa_hal.ops.attention import sparse_mla, sparse_mla_paged
from dsa_hal.ops.cache import gather_index_key, gather_latent, store_index_key, store_latent
from dsa_hal.ops.fused import indexer_qk, latent_qkv
from dsa_hal.ops.index_select import indexer_topk_paged
from dsa_hal.ops.indexer import indexer_logits_paged
from dsa_hal.ops.layout import KVLayout
from dsa_hal.ops.norm import rope
from dsa_hal.ops.prolog import mla_prolog, pack_prolog
from dsa_hal.ops.select import to_slots
from dsa_hal.ops.varlen import VARLEN, indexer_topk_varlen, mla_attention_varlen
from dsa_hal.registry import Op
from dsa_hal.selection import selection

SPLIT, INT8 = "latent_bf16_split/512+64", "latent_int8/512+64"


@pytest.fixture(autouse=True, params=["a2", "950"])
def on_npu(request: pytest.FixtureRequest) -> Iterator[None]:
    with emulated(request.param, checked=True):
        yield


def _row(op: Op[..., Any], name: str, **axes: Any) -> Row:
    """The best implementation of this backend, on a case of its own."""
    first = op.implementations(selection().target)[0]
    assert first.backend == "npu"
    return Row(op, first, case(name, **axes))


_MLA: dict[str, Any] = dict(tokens=5, context=300, heads=8, k=64, page_size=128)
_PAGED: dict[str, Any] = dict(batch=3, next_n=2, context=300, heads=8, k=96, page_size=128)
_INDEX: dict[str, Any] = dict(batch=5, next_n=2, context=300, page_size=128, topk=64)
_VARLEN: dict[str, Any] = dict(requests=5, tokens=19, context=300, page_size=128)
_STORE: dict[str, Any] = dict(tokens=20, pages=3, page_size=128)

CASES = (
    *(
        (mla_attention, f"{name}_{pattern}", dict(**_MLA, layout=layout, pattern=pattern))
        for name, layout in (("split", SPLIT), ("int8", INT8))
        for pattern in ("shuffled", "holes", "alternate", "single")
    ),
    (mla_attention, "short_context", dict(_MLA, context=9, layout=SPLIT)),
    (mla_attention, "no_tokens", dict(_MLA, tokens=0, layout=SPLIT)),
    *(
        (sparse_mla_paged, pattern, dict(**_PAGED, layout=SPLIT, pattern=pattern))
        for pattern in ("shuffled", "holes", "alternate", "single")
    ),
    (sparse_mla_paged, "short", dict(**_PAGED, layout=SPLIT, pattern="holes", short=True)),
    (sparse_mla_paged, "plan", dict(**_PAGED, layout=SPLIT, workers=5)),
    *(
        (indexer_topk_paged, f"{kind}_{lengths}", dict(**_INDEX, kind=kind, lengths=lengths))
        for kind in ("bf16", "int8_split")
        for lengths in ("ragged", "full")
    ),
    *(  # of five requests one has no new tokens; nothing may be known of its pages
        (op, f"varlen_{kind}", dict(**_VARLEN, **{name: kind}, **more))
        for op, name, kinds, more in (
            (indexer_topk_varlen, "kind", ("int8_split",), dict(topk=64)),
            (mla_attention_varlen, "form", ("latent_bf16_split", "latent_int8"),
             dict(heads=8, k=64)),
        )
        for kind in kinds
    ),
    *(
        (rope, f"interleaved_{interleaved}",
         dict(tokens=9, heads=2, dim=40, rope_dim=12, offset=20, interleaved=interleaved,
              dtype=torch.float32))
        for interleaved in (False, True)
    ),
    (indexer_topk_paged, "k_more", dict(_INDEX, kind="int8_split", context=130, topk=512)),
    *(
        (op, f"{name}_{holes}", dict(**_STORE, layout=layout, holes=holes))
        for op, name, layout in (
            (store_latent, "split", SPLIT), (store_latent, "int8", INT8),
            (store_latent, "tokens", "latent_bf16/512+64"),
            (store_index_key, "int8", "index_int8_split/128"),
            (store_index_key, "bf16", "index_bf16/128"),
            (gather_latent, "split", SPLIT), (gather_latent, "int8", INT8),
            (gather_index_key, "int8", "index_int8_split/128"),
        )
        for holes in ("none", "some", "all")
    ),
    (store_latent, "int8_zeros", dict(**_STORE, layout=INT8, values="tiny")),
    (store_latent, "int8_from_fp32", dict(**_STORE, layout=INT8, values="fp32")),
)  # fmt: skip


@pytest.mark.parametrize(("op", "name", "axes"), CASES, ids=lambda v: getattr(v, "name", None))
def test_layouts_of_the_device(op: Op[..., Any], name: str, axes: dict[str, Any]) -> None:
    outcome = attempt(_row(op, name, **axes))
    assert outcome.status == "ok", f"{outcome.detail}\n{outcome.trace}"


@pytest.mark.parametrize(
    ("op", "changed", "said"),
    [
        (mla_attention, dict(heads=192), "heads is 192"),
        (mla_attention, dict(page_size=64), "page is 64"),
        (mla_attention, dict(layout="latent_bf16/512+64"), "latent_bf16_split"),
        (mla_attention, dict(layout=""), "reads pages"),
        (sparse_mla_paged, dict(layout=INT8), "log-sum-exp"),
        (sparse_mla_paged, dict(sink=True), "no sinks"),
        (sparse_mla_paged, dict(dtype="fp32"), "query is fp32"),
        (indexer_topk_paged, dict(topk=2100), "2100"),
        (indexer_topk_paged, dict(page_size=64), "page is 64"),
        (indexer_topk_paged, dict(heads=96), "heads is 96"),
        (indexer_topk_paged, dict(dim=64), "64"),
        (indexer_topk_paged, dict(kind="int8"), "index_int8_split"),
        (store_latent, dict(layout="latent_fp8/512+64"), "fp8"),
        (indexer_qk, dict(quantize="fp8"), "'fp8'"),
    ],
)
def test_refusals_say_what_was_wrong(op: Op[..., Any], changed: dict[str, Any], said: str) -> None:
    usual: dict[str, dict[str, Any]] = {
        "mla_attention": dict(**_MLA, layout=SPLIT),
        "sparse_mla_paged": dict(**_PAGED, layout=SPLIT),
        "indexer_topk_paged": dict(**_INDEX, kind="bf16"),
        "store_latent": dict(**_STORE, layout=SPLIT),
        "indexer_qk": dict(tokens=3, heads=4, dim=128, rope_dim=64, interleaved=False,
                           quantize="int8", pow2=True, dtype=torch.bfloat16),
    }  # fmt: skip
    impl = _row(op, "").impl
    fits = op.inputs(Maker("meta", 0), **usual[op.name])
    assert impl.why_not(**fits) is None
    reason = impl.why_not(**op.inputs(Maker("meta", 0), **(usual[op.name] | changed)))
    assert reason is not None
    assert said in reason


def test_bf16_keys_are_selected_to_within_the_rounding_of_weights() -> None:
    """On 950 head weights become bf16, and the matrix's bar of 1e-3 is not met by every row."""
    inputs = indexer_topk_paged.inputs(
        Maker("cpu", 0), **(_INDEX | dict(batch=40)), kind="bf16", lengths="full"
    )
    chosen = _row(indexer_topk_paged, "").impl.fn(**inputs).long()
    scored = {k: v for k, v in inputs.items() if k not in ("topk", "ties", "logits_mb")}
    scores = indexer_logits_paged.reference(**scored)
    kth = scores.topk(inputs["topk"], -1).values[:, -1]
    short = (kth - scores.gather(1, chosen).amin(-1)) / scores.nan_to_num(neginf=0).amax(-1)
    bar = 2**-8 if selection().target.arch == "950" else 1e-6
    assert 0 <= float(short.max()) < bar


def test_both_varlen_ops_promise_it() -> None:
    for op in (indexer_topk_varlen, mla_attention_varlen):
        assert VARLEN in op.implementations(selection().target)[0].promises


# -- what reaches the kernels ---------------------------------------------------------------------


def test_keys_come_first_and_in_order() -> None:
    indices = torch.tensor([[-1, 7, -1, 3], [5, 6, 1, 2], [-1, -1, -1, -1]], dtype=torch.int32)
    assert _attention.compacted(indices, None).tolist() == [
        [7, 3, -1, -1], [5, 6, 1, 2], [-1, -1, -1, -1],
    ]  # fmt: skip
    lengths = torch.tensor([2, 3, 4], dtype=torch.int32)
    assert _attention.compacted(indices, lengths).tolist() == [
        [7, -1, -1, -1], [5, 6, 1, -1], [-1, -1, -1, -1],
    ]  # fmt: skip


def test_a_row_without_keys_names_one() -> None:
    indices = torch.tensor([[4, -1], [-1, -1]], dtype=torch.int32)
    named, nobody = _attention.keyed(indices)
    assert named.tolist() == [[4, -1], [0, -1]]
    assert nobody.tolist() == [[False], [True]]


def test_a_request_without_new_tokens_has_no_keys_for_the_kernel() -> None:
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    lengths = _attention.held(cu_seqlens, torch.tensor([9, 300, 5], dtype=torch.int32))
    assert lengths.dtype == torch.int32
    assert lengths.tolist() == [9, 0, 5]


@pytest.mark.parametrize("layout", [SPLIT, INT8])
def test_kernels_see_no_row_without_keys(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel makes of such a row, NaN included, does not reach the result."""
    from dsa_hal.backends.npu import mla_attention_varlen as module

    def run(name: str, **arguments: Any) -> Any:
        indices = arguments["sparse_indices"]
        assert bool((indices[:, 0, 0] >= 0).all())
        shape = (*arguments["query"].shape[:2], 512)
        out = torch.full(shape, torch.nan, dtype=torch.bfloat16)
        return out if name == "npu_kv_quant_sparse_flash_attention" else (out, None, None)

    monkeypatch.setattr(module, "call", run)
    inputs = mla_attention.inputs(Maker("cpu", 0), **_MLA, layout=layout, pattern="alternate")
    out = _row(mla_attention, "").impl.fn(**inputs)
    assert bool((out[::2] == 0).all())
    assert bool(out[1::2].isnan().all())


def test_lse_of_a_row_without_keys_is_written_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsa_hal.backends.npu import sparse_mla as module

    def run(name: str, **arguments: Any) -> Any:
        tokens, heads, _ = arguments["query"].shape
        return (
            torch.full((tokens, heads, 512), torch.nan, dtype=torch.bfloat16),
            torch.full((1, tokens, heads), 3.0),
            torch.full((1, tokens, heads), 2.0),
        )

    monkeypatch.setattr(module, "call", run)
    inputs = sparse_mla.inputs(
        Maker("cpu", 0), tokens=4, context=90, heads=8, k=16, pattern="alternate"
    )
    out, top, lse = _row(sparse_mla, "").impl.fn(**inputs)
    assert bool((out[::2] == 0).all()) and bool(out[1::2].isnan().all())
    assert bool((top[::2] == -torch.inf).all()) and bool((top[1::2] == 3).all())
    assert bool((lse[::2] == torch.inf).all())
    torch.testing.assert_close(lse[1::2], torch.full((2, 8), 3 + 2**0.0 * 0.6931472))


# -- fp16 weights of the int8 indexer -------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1.0, 1e6])
def test_weights_of_any_size_select_alike(factor: float) -> None:
    """q's scale and the constants are in the weights, which fp16 alone could not hold."""
    inputs = indexer_topk_paged.inputs(Maker("cpu", 0), **_INDEX, kind="int8_split", lengths="full")
    impl = _row(indexer_topk_paged, "").impl
    want = impl.fn(**inputs).sort(-1).values
    inputs["weights"] = inputs["weights"] * factor
    assert torch.equal(impl.fn(**inputs).sort(-1).values, want)
    narrow = inputs["weights"].to(torch.float16)
    assert bool((narrow == 0).all()) == (factor == 1e-12)
    assert bool(narrow.isinf().any()) == (factor == 1e6)


def test_shrunk_weights_keep_signs_and_ratios() -> None:
    weights = torch.tensor([[3e-9, -1e-9, 1e-12, 0.0], [0.0, 0.0, 0.0, 0.0], [5e7, 1.0, -1.0, 2e7]])
    small = _attention.shrunk(weights)
    assert small.dtype == torch.float16
    assert small[0].tolist()[0] == small[2].tolist()[0] == _attention.TOP_WEIGHT
    assert small[1].tolist() == [0, 0, 0, 0]
    assert small[0, 1].item() == pytest.approx(-_attention.TOP_WEIGHT / 3, rel=2**-11)
    assert small[2, 3].item() == pytest.approx(_attention.TOP_WEIGHT * 0.4, rel=2**-11)


# -- slots and positions --------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["latent_bf16_split", "latent_int8"])
def test_slots_and_positions_are_told_apart(form: str) -> None:
    """`mla_attention` by slots is `mla_attention_varlen` by positions; slots where positions are
    due give something else, or positions that no request has."""
    inputs = mla_attention_varlen.inputs(
        Maker("cpu", 1), requests=3, tokens=9, context=300, heads=8, k=64, page_size=128, form=form,
        pattern="even",
    )  # fmt: skip
    by_positions = mla_attention_varlen(**inputs)
    rows = inputs["block_table"].repeat_interleave(3, 0)
    slots = to_slots(inputs["positions"], rows, page_size=128)
    by_slots = mla_attention(
        inputs["q"], inputs["kv_b"], inputs["pages"], slots,
        softmax_scale=inputs["softmax_scale"], layout=inputs["layout"],
    )  # fmt: skip
    assert not torch.equal(slots, inputs["positions"])
    torch.testing.assert_close(by_positions, by_slots, rtol=0.02, atol=1e-3)
    room = slots % (128 * inputs["block_table"].shape[1])
    wrong = mla_attention_varlen(**(inputs | {"positions": torch.where(slots < 0, -1, room % 298)}))
    assert not torch.allclose(wrong, by_positions, rtol=0.02, atol=1e-3)


def test_query_tokens_of_a_request_see_what_stands_before_them() -> None:
    inputs = indexer_topk_varlen.inputs(
        Maker("cpu", 0), requests=1, tokens=4, context=4, topk=8, kind="bf16", page_size=128,
        pattern="even",
    )  # fmt: skip
    found = indexer_topk_varlen(**inputs)
    for token, row in enumerate(found):
        assert sorted(row[row >= 0].tolist()) == list(range(token + 1))


# -- the host waits for nothing -------------------------------------------------------------------


def _answers(name: str, **arguments: Any) -> Any:
    """Empty results of the right shapes, on meta."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q = arguments.get("query")
    tokens, heads = q.shape[:2] if q is not None else (0, 0)
    chosen = empty(tokens, 1, arguments.get("sparse_count", 0), dtype=torch.int32)
    out = empty(tokens, heads, 512, dtype=torch.bfloat16)
    top = empty(1, tokens, heads, dtype=torch.float32)
    source = arguments.get("input", out)
    answers: dict[str, Callable[[], Any]] = {
        "npu_lightning_indexer": lambda: (chosen, chosen),
        "npu_quant_lightning_indexer": lambda: chosen,
        "npu_sparse_flash_attention": lambda: (out, top, top),
        "npu_kv_quant_sparse_flash_attention": lambda: out,
        "npu_scatter_nd_update_": lambda: source,
        "npu_rotary_mul": lambda: source,
        "npu_dynamic_quant": lambda: (
            source.to(torch.int8), empty(*source.shape[:-1], dtype=torch.float32),
        ),
    }  # fmt: skip
    return answers[name]()


@pytest.mark.parametrize(
    ("op", "axes"),
    [
        (mla_attention, dict(**_MLA, layout=SPLIT)),
        (mla_attention, dict(**_MLA, layout=INT8)),
        (sparse_mla, dict(tokens=5, context=300, heads=8, k=64, short=False)),
        (sparse_mla_paged, dict(**_PAGED, layout=SPLIT)),
        (indexer_topk_paged, dict(**_INDEX, kind="bf16")),
        (indexer_topk_varlen, dict(requests=3, tokens=9, context=300, topk=64, kind="int8_split",
                                   page_size=128)),
        (mla_attention_varlen, dict(requests=3, tokens=9, context=300, heads=8, k=64,
                                    page_size=128, form="latent_bf16_split")),
        (store_latent, dict(**_STORE, layout=INT8, holes="some")),
        (store_index_key, dict(**_STORE, layout="index_int8_split/128", holes="some")),
        (gather_latent, dict(**_STORE, layout=SPLIT, holes="some")),
        (rope, dict(tokens=5, heads=2, dim=192, rope_dim=64, offset=128, interleaved=True,
                    dtype=torch.bfloat16)),
        (indexer_qk, dict(tokens=3, heads=4, dim=128, rope_dim=64, interleaved=False,
                          quantize="int8", pow2=True, dtype=torch.bfloat16)),
    ],
    ids=lambda v: getattr(v, "name", None),
)  # fmt: skip
def test_no_data_is_read_on_the_host(
    op: Op[..., Any], axes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On meta tensors there is no data: whatever asked for a number would raise."""
    impl = _row(op, "").impl
    for name in ("_slots", "mla_attention_varlen", "sparse_mla", "rope",
                 "indexer_topk_varlen", "indexer_qk"):  # fmt: skip
        monkeypatch.setattr(import_module(f"dsa_hal.backends.npu.{name}"), "call", _answers)
    impl.fn(**op.inputs(Maker("meta", 0), **axes))


def test_pools_that_lie_apart_are_refused_in_words() -> None:
    form = KVLayout.parse("latent_bf16/512+64")
    pages = form.empty(4, 128)[::2]
    with pytest.raises(Exception, match="store_latent: pages have strides"):
        _slots.write(
            "store_latent", pages, torch.zeros(1, 576), torch.zeros(1, dtype=torch.int32),
            form.spec, True,
        )  # fmt: skip


# -- the prolog -----------------------------------------------------------------------------------


def test_attention_after_the_prolog_is_that_after_its_steps() -> None:
    """Rotated parts come out in another order than the steps leave, queries' and keys' alike."""
    sizes = dict(hidden=6144, q_lora=1536, heads=1, nope=128, rope_dim=64, lora=512)
    inputs = mla_prolog.inputs(
        Maker("cpu", 0), tokens=3, layout="latent_bf16_split", page_size=128, **sizes
    )
    x, (q_a, q_b, k_b, kv_a), slots = inputs["x"], inputs["weights"], inputs["slots"]
    where, table = inputs["positions"], inputs["cos_sin"]
    stepwise = inputs["pages"].clone()

    def attended(query: Tensor, pages: Tensor) -> Tensor:
        return sparse_mla_paged(
            query[:, None], pages, slots.expand(3, 1, 3).contiguous(), layout=SPLIT,
            softmax_scale=0.02,
        )[0]  # fmt: skip

    packed = pack_prolog(inputs["weights"])
    query, rotated, qr = mla_prolog(**(inputs | {"weights": packed}))
    at_once = attended(torch.cat([query, rotated], -1), inputs["pages"])
    with use(backend="cpu"):
        own_qr, latent = latent_qkv(
            x @ q_a, x @ kv_a, inputs["q_norm"], inputs["kv_norm"], where, table
        )
        q = rope((own_qr @ q_b).view(3, 1, 192), where, table, interleaved=True, offset=128)
        store_latent(stepwise, latent, slots, layout=SPLIT)
    absorbed = torch.bmm(q[..., :128].transpose(0, 1), k_b).transpose(0, 1)
    in_steps = attended(torch.cat([absorbed, q[..., 128:]], -1), stepwise)
    assert not torch.allclose(rotated.float(), q[..., 128:].float(), atol=0.1)
    torch.testing.assert_close(qr, own_qr, rtol=0.02, atol=0.02)
    torch.testing.assert_close(at_once, in_steps, rtol=0.05, atol=0.05)
