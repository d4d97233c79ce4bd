"""Requests of any length in one call: the ops' own mistakes, and the model that runs on them, on
the processor, whose composite bodies are told to promise what only some device's kernels do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import one_thread
from random_model import CONFIG
from test_quality import write as write_tiny
from torch import Tensor

import dsa_hal
from dsa_hal.errors import BadInput, ConfigError
from dsa_hal.model import Precision, Transformer, generate
from dsa_hal.model.decoder import FixedBatch
from dsa_hal.model.quality.perplexity import losses
from dsa_hal.model.quality.recall import recall
from dsa_hal.model.quality.selectors import selecting
from dsa_hal.ops.select import to_slots
from dsa_hal.ops.varlen import (
    VARLEN,
    indexer_topk_varlen,
    mla_attention_varlen,
    requests_of,
)
from dsa_hal.registry import Op
from dsa_hal.selection import current
from dsa_hal.target import Architecture, Target

VOCAB, CHUNK = 256, 37
FP32 = Precision(weights="fp32")
SPLIT = Architecture(
    name="any", device="processor with pages of 128 tokens", processors=1, shared=0, page_size=128,
    caches={
        "latent_bf16": "latent_bf16_split", "latent_fp32": "latent_fp32_split",
        "latent_int8": "latent_int8", "index_bf16": "index_bf16", "index_fp32": "index_fp32",
        "index_int8": "index_int8_split",
    },
)  # fmt: skip


def with_limits(limits: Architecture) -> Target:
    return replace(current(), limits=limits)


@contextmanager
def promised(target: Target | None = None) -> Iterator[list[str]]:
    """Within the block the composites' bodies promise VARLEN on the processor; a list of the calls
    that they get."""
    calls: list[str] = []

    def counted(op: Op[..., Tensor]) -> Callable[..., Tensor]:
        def body(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(op.name)
            return op.body(*args, **kwargs)  # type: ignore[attr-defined]

        body.__wrapped__ = op.__wrapped__  # type: ignore[attr-defined]
        return body

    ops: Sequence[Op[..., Tensor]] = (indexer_topk_varlen, mla_attention_varlen)
    for op in ops:
        promises = ("deterministic", "ties=lower", VARLEN)
        op.impl("cpu", "pages", contract=1, promises=promises)(counted(op))
    try:
        with dsa_hal.use(target=target or current()):
            yield calls
    finally:
        for op in ops:
            del op._impls["cpu/pages"]


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> Path:
    """A latent of 128 + 64, 16 index heads of 128, 16 keys selected."""
    return write_tiny(tmp_path_factory.mktemp("varlen") / "tiny")


@pytest.fixture(scope="module")
def text() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(2, VOCAB, (n,), generator=generator) for n in (3, 90, 1, 16, 140)]


def off(got: Tensor, want: Tensor) -> float:
    """The largest relative error of a row of logits."""
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())


# -- the model -----------------------------------------------------------------------------------


def logits(model: Transformer, text: Sequence[Tensor], chunk: int = CHUNK, new: int = 3) -> Tensor:
    """Logits of a ragged batch's prompts, prefilled together in chunks, then of three steps of
    `new` tokens each, [rows, vocab]."""
    cache, contexts = model.new_cache([len(ids) + 3 * new for ids in text])
    prompts = [model.checked(ids) for ids in text]
    rows = [out for _, out in model.prefill(cache, contexts, prompts, chunk=chunk, every=True)]
    fed = torch.arange(len(text) * 3 * new).view(len(text), 3, new) % VOCAB
    rows += [model.decode(cache, contexts, part[:, 0]).flatten(0, 1) for part in fed.split(1, 1)]
    return torch.cat(rows)


@pytest.mark.parametrize("page_size", [64, 128])
def test_it_computes_what_the_other_forms_do(
    tiny: Path, text: list[Tensor], page_size: int
) -> None:
    """In fp32, ragged batches, prompts in chunks, decoding of several new tokens."""
    plain = Transformer.from_pretrained(tiny, precision=FP32)
    want = logits(plain, text)
    target = with_limits(SPLIT) if page_size == 128 else None
    with promised(target) as calls:
        model = Transformer.from_pretrained(tiny, precision=FP32)
        got = logits(model, text)
        assert model.formats.page_size == page_size
        assert set(calls) == {"mla_attention_varlen", "indexer_topk_varlen"}
        assert off(got, want) < 1e-4
        options: Any = dict(max_new_tokens=9, stop_ids=(), prefill_chunk=CHUNK)
        ids = [prompt.tolist() for prompt in text]
        tokens = generate(model, ids, **options)
    assert tokens == generate(plain, ids, **options)


def test_nothing_else_is_asked(tiny: Path, text: list[Tensor]) -> None:
    """No op of another form is bound or called; the indexer is not while every key is selected."""
    with promised() as calls:
        model = Transformer.from_pretrained(tiny, precision=FP32)
        short = [ids[:16] for ids in text]
        model.attention_ops.varlen = True
        cache, contexts = model.new_cache([16] * len(short))
        for _ in model.prefill(cache, contexts, [model.checked(ids) for ids in short]):
            pass
        assert calls == ["mla_attention_varlen"] * model.config.num_hidden_layers
        logits(model, text)
    others = {"indexer_topk", "mha_prefill", "gather_latent", "gather_index_key", "mla_attention"}
    assert not others & model.served.keys()
    assert model.served["indexer_topk_varlen"] == "cpu/pages"


def test_a_form_can_still_be_named(tiny: Path, text: list[Tensor]) -> None:
    """Its ops are bound at their first call."""
    with promised() as calls:
        model = Transformer.from_pretrained(tiny, precision=FP32)
        want = logits(model, text)
        for form in ("mha", "mqa"):
            calls.clear()
            model.form = form  # type: ignore[assignment]
            assert off(logits(model, text), want) < 1e-4
            decodes = 3 * model.config.num_hidden_layers
            assert calls.count("mla_attention_varlen") == decodes
    assert {"mha_prefill", "mla_attention", "indexer_topk"} <= model.served.keys()


def test_steps_on_fixed_memory_give_the_same(tiny: Path, text: list[Tensor]) -> None:
    """What is recorded where a device can: every step asks for the longest room."""
    with promised():
        model = Transformer.from_pretrained(tiny, precision=FP32)
        prompts = [model.checked(ids) for ids in text]
        room = [len(ids) + 5 for ids in text]
        pair = []
        for fixed in (False, True):
            cache, contexts = model.new_cache([most + 64 for most in room])
            for _ in model.prefill(cache, contexts, prompts):
                pass
            batch = FixedBatch(model, cache, contexts, room, record=False) if fixed else None
            rows = []
            for at in range(4):
                fed = [at + 7] * len(text)
                if batch is None:
                    rows.append(model.decode(cache, contexts, torch.tensor(fed)[:, None])[:, 0])
                else:
                    rows.append(batch(fed))
            pair.append(torch.cat(rows))
    assert off(*pair) < 1e-4


def test_quality_measures_it_like_the_others(tiny: Path, text: list[Tensor]) -> None:
    """Selectors in the indexer's place, and recall, which asks for keys per head."""
    windows = [text[1], text[4]]

    def measured() -> list[Any]:
        model = Transformer.from_pretrained(tiny, precision=FP32)
        found: list[Any] = [recall(model, windows).whole.selected]
        for selector in ("dsa", "dense", "recent"):
            with selecting(model, selector):
                found.append(float(losses(model, windows[1]).mean()))
        return found

    want = measured()
    with promised() as calls:
        got = measured()
    assert "mla_attention_varlen" in calls
    assert got == pytest.approx(want, rel=1e-4)
    assert len(set(want[1:])) == 3


# -- int8 caches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [64, 128])
def test_int8_caches_are_close_to_bf16(tiny: Path, text: list[Tensor], page_size: int) -> None:
    """Logits and perplexity against unquantised caches, with which FP8 ones differ more. On pages
    of 128 tokens through the ops for requests of any length, and in split order."""

    def made(cache: str) -> Transformer:
        wish = Precision(weights="fp32", index_cache=cache, latent_cache=cache)
        return Transformer.from_pretrained(tiny, precision=wish)

    def found(cache: str) -> tuple[Transformer, float, float]:
        model = made(cache)
        row = (logits(model, text) - want).norm(dim=-1) / want.norm(dim=-1)
        return model, float(row.mean()), float(losses(model, text[4]).mean())

    exact = made("fp32")
    want, loss = logits(exact, text), float(losses(exact, text[4]).mean())
    _, bf16, _ = found("bf16")
    _, fp8, _ = found("fp8")
    if page_size == 64:
        model, int8, small = found("int8")
    else:
        with promised(with_limits(SPLIT)):
            model, int8, small = found("int8")
    specs = {64: "index_int8/128", 128: "index_int8_split/128"}
    assert model.formats.index.spec == specs[page_size]
    assert model.formats.latent.spec == "latent_int8/128+64"
    assert bf16 < int8 < fp8 / 2
    assert abs(small - loss) < 0.01, "perplexity differs by more than 1%"


def test_int8_keys_select_like_unquantised_ones(tiny: Path, text: list[Tensor]) -> None:
    """With 16 of 140 keys selected, the losses of a text move by less than selecting other keys
    moves them."""
    window = text[4]

    def loss(index: str, selector: str = "dsa") -> float:
        wish = Precision(weights="fp32", index_cache=index)
        model = Transformer.from_pretrained(tiny, precision=wish)
        with selecting(model, selector):
            return float(losses(model, window).mean())

    own, other = loss("fp32"), loss("fp32", "recent")
    assert abs(loss("int8") - own) < abs(other - own) / 5


# -- formats of a target -------------------------------------------------------------------------


def test_formats_follow_the_target(tiny: Path) -> None:
    """Without a wish, a format that it lacks is bf16; a wish that it cannot have is refused."""
    without = replace(
        SPLIT, caches={"latent_bf16": "latent_bf16_split", "index_bf16": "index_bf16"}
    )
    with dsa_hal.use(target=with_limits(without)):
        formats = Transformer.from_pretrained(tiny).formats
        assert (formats.weights, formats.page_size) == ("fp8", 128)
        assert (formats.latent.spec, formats.index.spec) == (
            "latent_bf16_split/128+64", "index_bf16/128",
        )  # fmt: skip
        with pytest.raises(ConfigError, match=r"index_cache is to be fp8.*pages of 128.*take bf16"):
            Transformer.from_pretrained(tiny, precision=Precision(index_cache="fp8"))
    with pytest.raises(ConfigError, match="'int8'"):
        Precision(weights="int8")


def test_int8_asks_for_sizes_that_it_can_scale(tmp_path: Path) -> None:
    config = replace(CONFIG, kv_lora_rank=64, num_hidden_layers=1, quant=None)
    folder = write_tiny(tmp_path / "odd", config)
    with pytest.raises(ConfigError, match="cached as int8: kv_lora_rank is 64"):
        Transformer.from_pretrained(folder, precision=Precision(latent_cache="int8"))


# -- the ops -------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [indexer_topk_varlen, mla_attention_varlen], ids=str)
@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("cu_seqlens_q", lambda t: t[1:], r"cu_seqlens_q has shape \[5\]; expected \[6\]"),
        ("cu_seqlens_q", lambda t: t.long(), "cu_seqlens_q is torch.int64"),
        ("context_lens", lambda t: t[:, None], r"context_lens has shape \[5, 1\]"),
        ("block_table", lambda t: t[:-1], r"block_table has shape"),
        ("block_table", lambda t: t.long(), "block_table is torch.int64"),
    ],
)
def test_wrong_requests_are_refused(
    op: Op[..., Tensor], name: str, change: Callable[[Tensor], Tensor], words: str
) -> None:
    inputs = next(case for case in op.cases if case.name == "ragged").make(op.inputs)
    with pytest.raises(BadInput, match=words):
        op(**(inputs | {name: change(inputs[name])}))


def test_numbers_are_looked_at_on_request() -> None:
    inputs = next(c for c in mla_attention_varlen.cases if c.name == "ragged").make(
        mla_attention_varlen.inputs
    )
    room = inputs["block_table"].shape[1] * inputs["pages"].shape[1]
    inputs["positions"][3, 0] = room
    with dsa_hal.use(checked=True), pytest.raises(BadInput, match=rf"positions\[3, 0\] is {room}"):
        mla_attention_varlen(**inputs)


def test_slots_are_not_positions() -> None:
    """The check sees what shapes do not show."""
    op = mla_attention_varlen
    inputs = next(case for case in op.cases if case.name == "split").make(op.inputs)
    want = (op.reference(**inputs),)
    assert op.check((op(**inputs),), want, inputs).ok
    table, size = inputs["block_table"], inputs["pages"].shape[1]
    request = requests_of(inputs["cu_seqlens_q"], len(inputs["q"]))
    slots = to_slots(inputs["positions"], table[request], page_size=size)
    with pytest.raises(BadInput):
        op(**(inputs | {"positions": slots}))
    inside = torch.where(slots < 0, -1, slots % (table.shape[1] * size))
    assert not op.check((op(**(inputs | {"positions": inside})),), want, inputs).ok
