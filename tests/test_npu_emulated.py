"""The Ascend backend's own code on emulated ops: the matrix, the built-in model, and planted errors
of each kind, which must show."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import one_thread
from torch import Tensor

from ci.ascend import record
from ci.ascend.emulated import ARCHES, KERNELS, Misuse, emulated
from ci.ascend.quality import BF16, WAYS, measured
from dsa_hal import use
from dsa_hal.backends.npu import _constraints, linear, mla_attention_varlen
from dsa_hal.errors import BadInput
from dsa_hal.matrix import attempt, rows, smallest
from dsa_hal.model import ModelConfig, Transformer, generate
from dsa_hal.model.builtin import HELDOUT, builtin_checkpoint
from dsa_hal.model.tokenizer import Tokenizer
from dsa_hal.selection import OPS

CLOSE = 1.01
"""Times the processor's perplexity that int8 weights and caches may have."""


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


# -- the matrix -----------------------------------------------------------------------------------

SAME = ("indexer_qk", "moe_experts", "rms_norm", "rope", "route", "sparse_mla", "store_index_key")
"""Ops that are judged anew; `python -m ci.ascend.record` judges all."""


@pytest.mark.parametrize("arch", ARCHES)
def test_the_record_is_what_a_run_gives(arch: str) -> None:
    found = record.judged(arch, SAME, "npu")
    assert not [row for row in found if row["status"] == "failed"]
    fused = {(row["op"], row["impl"]) for row in found}
    with record.path(arch).open() as file:
        kept = [row for row in csv.DictReader(file) if (row["op"], row["impl"]) in fused]
    columns = ("op", "impl", "case", "status")
    now, before = (sorted([tuple(map(row.get, columns)) for row in told]) for told in (found, kept))
    assert now == before, "run: python -m ci.ascend.record"


@pytest.mark.parametrize("arch", ARCHES)
def test_the_record_holds_no_failure_and_every_op(arch: str) -> None:
    with record.path(arch).open() as file:
        kept = list(csv.DictReader(file))
    assert not [row for row in kept if row["status"] == "failed"]
    assert {row["op"] for row in kept if row["status"] == "ok"} == set(OPS)


# -- the built-in model ---------------------------------------------------------------------------


def prompts(folder: Path, config: ModelConfig) -> list[list[int]]:
    """The beginnings of three held-out texts, shorter and longer than what the indexer selects."""
    assert config.index_topk == 256
    tokenizer = Tokenizer.load(folder, config)
    lines = (json.loads(line)["text"] for line in (folder / HELDOUT).read_text().splitlines())
    texts = islice((t for line in lines if len(t := tokenizer.encode(line)) > 700), 3)
    return [text[:length] for text, length in zip(texts, (40, 300, 700), strict=True)]


LONG = dict(max_new_tokens=64, stop_ids=(), repetition_penalty=1.3)
"""Greedy, and kept from saying one thing again and again, as so small a model does."""


def test_64_greedy_tokens_are_the_processors() -> None:
    """Both with weights, caches and activations in bf16. What is rounded in between differs (one
    attends in the absorbed form alone), so that two tokens whose logits are closer than that may
    change places, as they may between two batches on one backend: these texts have none such."""
    folder = builtin_checkpoint()
    with use(backend="cpu"):
        model = Transformer.from_pretrained(folder, precision=BF16)
        asked = prompts(folder, model.config)
        want = generate(model, asked, **LONG)
    with emulated("a2"):
        model = Transformer.from_pretrained(folder, precision=BF16)
        assert model.formats.latent.order == "split" and model.formats.page_size == 128
        got = generate(model, asked, **LONG)
    assert got == want
    assert len({token for row in want for token in row}) > 64


def test_int8_predicts_as_well_as_the_processor() -> None:
    """Weights, activations and both caches in int8, on a context of four times what is selected."""
    ways = [way for way in WAYS if way.name in ("cpu, FP8", "npu, W8A8, int8 caches")]
    cpu, npu = measured(1024, 1, ways)
    whole, late = npu / cpu
    assert 1 / CLOSE <= whole <= CLOSE and 1 / CLOSE <= late <= CLOSE


# -- planted errors -------------------------------------------------------------------------------

Arguments = dict[str, Any]


def slots(a: Arguments) -> Arguments:
    """Where positions are due."""
    at, page = a["sparse_indices"][:, 0], a["key"].shape[1]
    ends = a["actual_seq_lengths_query"]
    token = torch.arange(len(at), dtype=torch.int32)
    table = a["block_table"][torch.searchsorted(ends, token, right=True)]
    known = at.clamp_min(0).long()
    found = table.gather(1, known // page) * page + known % page
    return a | {"sparse_indices": torch.where(at < 0, at, found.to(at.dtype))[:, None]}


def small_pages(a: Arguments) -> Arguments:
    """The same keys, in pages of 64: documented, but run by nobody."""
    halves = {name: a[name].unflatten(1, (2, 64)).flatten(0, 1) for name in ("key", "key_rope")}
    table = torch.stack([2 * a["block_table"], 2 * a["block_table"] + 1], -1).flatten(1)
    return a | halves | {"value": halves["key"], "block_table": table}


def own_lengths(a: Arguments) -> Arguments:
    """Each request's own number of tokens, where sums are due."""
    ends = a["actual_seq_lengths_query"]
    return a | {"actual_seq_lengths_query": torch.cat([ends[:1], ends.diff()])}


def misspelt(a: Arguments) -> Arguments:
    return {name.replace("sparse_mode", "sparse_mod"): value for name, value in a.items()}


PLANTED: dict[str, tuple[Callable[[Arguments], Arguments], str, bool]] = {
    "misspelt keyword": (misspelt, "sparse_mod", True),
    "wrong dtype": (lambda a: a | {"sparse_indices": a["sparse_indices"].long()}, "int", True),
    "attention_mode 0": (lambda a: a | {"attention_mode": 0}, "attention_mode", True),
    "pages of 64": (small_pages, "page", True),
    "slots for positions": (slots, "name position", False),
    "wrong cumulative lengths": (own_lengths, "cumulative", False),
    "an invalid entry before a valid one": (
        lambda a: a | {"sparse_indices": a["sparse_indices"].flip(-1)}, "come first", False,
    ),
}  # fmt: skip
"""What is planted into the call of attention, what is said of it, and whether the table says it: it
does not read data, so that the emulated op has to."""


def call_of_attention(monkeypatch: pytest.MonkeyPatch) -> Arguments:
    """What the backend passes to attention for three requests."""
    seen: list[Arguments] = []

    def noted(name: str, **arguments: Any) -> Any:
        seen.append(arguments)
        return getattr(torch.ops.npu, name)(**arguments)

    with monkeypatch.context() as patched:
        patched.setattr(mla_attention_varlen, "call", noted)
        patched.setattr(mla_attention_varlen, "_why_not", lambda *_, **__: None)
        torch.manual_seed(0)
        tokens, heads = 9, 4
        pages = torch.randn(12 * 128 * 576).to(torch.bfloat16).view(12, 128, 576)
        lengths = torch.tensor([300, 4, 200], dtype=torch.int32)
        chosen = torch.full((tokens, 64), -1, dtype=torch.int32)
        for token, limit in enumerate((297, 298, 299, 300, 3, 4, 198, 199, 200)):
            picked = torch.randperm(limit)[:60].to(torch.int32)
            chosen[token, : len(picked)] = picked
        with use(mla_attention_varlen="sparse_flash_attention"):
            OPS["mla_attention_varlen"](
                torch.randn(tokens, heads, 192).to(torch.bfloat16),
                torch.randn(heads, 256, 512).to(torch.bfloat16), pages, chosen,
                torch.tensor([0, 4, 6, 9], dtype=torch.int32), lengths,
                torch.randperm(12).to(torch.int32).view(3, 4), softmax_scale=0.1,
                layout="latent_bf16_split/512+64",
            )  # fmt: skip
    return seen[0]


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_shows(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the constraint table before the call, or in the emulated op."""
    plant, words, in_table = PLANTED[planted]
    with emulated("a2", checked=True):
        right = call_of_attention(monkeypatch)
        call = mla_attention_varlen.call
        out = call("npu_sparse_flash_attention", **right)[0]
        assert not out.isnan().any()
        with pytest.raises(BadInput if in_table else Misuse, match=words):
            call("npu_sparse_flash_attention", **plant(right))


@pytest.mark.parametrize("planted", ["misspelt keyword", "wrong dtype", "attention_mode 0"])
def test_the_op_sees_it_too_where_the_table_is_silent(
    planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, words, _ = PLANTED[planted]
    with emulated("a2"):
        wrong = plant(call_of_attention(monkeypatch))
        with pytest.raises(RuntimeError, match=words):
            mla_attention_varlen.call("npu_sparse_flash_attention", **wrong)


def test_a_call_that_errs_is_a_red_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the matrix under a call with a planted keyword."""
    with emulated("a2"):
        op = OPS["silu_mul"]
        found = rows([op], cases=[smallest(op).name])
        row = next(row for row in found if row.impl.name == "swiglu")
        assert attempt(row).status == "ok"
        monkeypatch.setattr("dsa_hal.backends.npu.silu_mul.call", _planted(dim="axis"))
        outcome = attempt(row)
        assert outcome.status == "failed" and "axis" in outcome.detail


def _planted(**renamed: str) -> Callable[..., Any]:
    def call(name: str, **arguments: Any) -> Any:
        wrong = {renamed.get(key, key): value for key, value in arguments.items()}
        return getattr(torch.ops.npu, name)(**wrong)

    return call


def test_scales_of_the_wrong_axis_show() -> None:
    """int8 weights scaled per input and not per output: the product is another one, and where sizes
    differ the table says so."""
    torch.manual_seed(1)
    weight = torch.randn(256, 256) * torch.logspace(-2, 2, 256)[:, None]
    x = torch.randn(5, 256).to(torch.bfloat16)
    want = x.float() @ weight.T

    def lost(codes: Tensor, scale: Tensor) -> float:
        arguments = dict(x2=codes, scale=scale, output_dtype=torch.bfloat16)
        values, each = linear.call("npu_dynamic_quant", input=x)
        got = linear.call("npu_quant_matmul", x1=values, pertoken_scale=each, **arguments)
        return float((got.float() - want).norm() / want.norm())

    with emulated("a2", checked=True):
        right = weight.abs().amax(1) / 127
        codes = (weight / right[:, None]).round().to(torch.int8).T.contiguous()
        assert lost(codes, right) < 0.02
        wrong = weight.abs().amax(0) / 127
        assert lost((weight / wrong).round().to(torch.int8).T.contiguous(), wrong) > 0.1
        with pytest.raises(BadInput, match="channels"):
            lost(codes, right[:128])


def test_the_table_and_the_emulation_know_the_same_ops() -> None:
    assert set(_constraints.table()) == set(KERNELS)
