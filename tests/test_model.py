"""The model against transformers' own, and against itself in every other way of computing it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import GEOMETRIES, one_thread, prompt, write
from torch import Tensor

from dsa_hal.errors import BadInput, ConfigError
from dsa_hal.model import Precision, Transformer
from dsa_hal.model.batch import attention_flop, pieces, prefers_mha
from dsa_hal.model.cache import Context, KVCache
from dsa_hal.model.config import ModelConfig
from dsa_hal.ops.layout import KVLayout

CONTEXT = 90
BOUND = 1e-4


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module", params=GEOMETRIES)
def pair(request: Any, tmp_path_factory: Any) -> tuple[Transformer, Any]:
    """Our model and transformers' on one random fp32 checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = write(folder, request.param)
    return Transformer.from_pretrained(folder), theirs


def largest(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def decoded(model: Transformer, ids: Tensor, start: int, count: int) -> Tensor:
    """Logits of ids[:, start:], with the tokens up to start prefilled and the rest decoded `count`
    at a time."""
    cache, contexts = model.new_cache([ids.shape[1]] * ids.shape[0])
    for _ in model.prefill(cache, contexts, [model.checked(row[:start]) for row in ids]):
        pass
    steps = [model.decode(cache, contexts, part) for part in ids[:, start:].split(count, 1)]
    return torch.cat(steps, 1)


# -- against transformers ------------------------------------------------------------------------


def test_logits_are_those_of_transformers(pair: tuple[Transformer, Any]) -> None:
    model, theirs = pair
    ids = prompt(CONTEXT)
    assert model.config.index_topk * 5 < CONTEXT
    with torch.no_grad():
        want = theirs(ids).logits
    got = model(ids)
    assert got.dtype == torch.float32
    assert want.abs().max() > 1
    assert largest(got, want) < BOUND


def test_decoded_logits_are_those_of_transformers(pair: tuple[Transformer, Any]) -> None:
    model, theirs = pair
    ids = prompt(40)
    with torch.no_grad():
        want = theirs(ids).logits[:, 4:]
    assert largest(decoded(model, ids, 4, 1), want) < BOUND


# -- against itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_prefill_in_chunks_of_any_size(pair: tuple[Transformer, Any], chunk: int) -> None:
    model, _ = pair
    ids = prompt(CONTEXT)
    cache, contexts = model.new_cache([CONTEXT])
    steps = model.prefill(cache, contexts, [model.checked(ids[0])], chunk=chunk, every=True)
    got = torch.cat([logits for _, logits in steps])
    assert contexts[0].length == CONTEXT
    assert largest(got, model(ids)[0]) < BOUND


def test_a_ragged_batch_is_its_rows_alone(pair: tuple[Transformer, Any]) -> None:
    model, _ = pair
    lengths = [1, 77, 8, 64, 23]
    ids = torch.full((len(lengths), max(lengths)), 5)
    for row, length in enumerate(lengths):
        ids[row, :length] = prompt(length, seed=row)
    got = model(ids, lengths)
    for row, length in enumerate(lengths):
        assert largest(got[row, :length], model(ids[row : row + 1, :length])[0]) < BOUND
        assert not got[row, length:].any()


@pytest.mark.parametrize("chunk", [CONTEXT, 20])
def test_both_forms_of_attention_agree(
    pair: tuple[Transformer, Any], chunk: int, monkeypatch: Any
) -> None:
    model, _ = pair
    ids = prompt(CONTEXT)

    def run(form: Any) -> Tensor:
        monkeypatch.setattr(model, "form", form)
        cache, contexts = model.new_cache([CONTEXT])
        steps = model.prefill(cache, contexts, [model.checked(ids[0])], chunk=chunk, every=True)
        return torch.cat([logits for _, logits in steps])

    assert largest(run("mha"), run("mqa")) < BOUND


@pytest.mark.parametrize("count", [1, 3])
def test_decode_is_prefill(pair: tuple[Transformer, Any], count: int) -> None:
    """Also with several new tokens a step, as verification of drafted tokens has them."""
    model, _ = pair
    ids = torch.cat([prompt(70), prompt(70, seed=1)])
    want = model(ids)[:, 58:]
    assert largest(decoded(model, ids, 58, count), want) < BOUND


def test_decode_of_a_ragged_batch(pair: tuple[Transformer, Any]) -> None:
    model, _ = pair
    prompts = [prompt(n, seed=n)[0] for n in (3, 66, 20)]
    cache, contexts = model.new_cache([len(p) + 4 for p in prompts])
    for _ in model.prefill(cache, contexts, prompts, chunk=16):
        pass
    more = prompt(4, seed=9)[0]
    got = torch.cat(
        [model.decode(cache, contexts, token.repeat(3, 1)) for token in more.split(1)], 1
    )
    for row, p in enumerate(prompts):
        want = model(torch.cat([p, more])[None])[0, len(p) :]
        assert largest(got[row], want) < BOUND


# -- precision -----------------------------------------------------------------------------------


def test_precision_follows_the_checkpoint_and_can_be_set(tmp_path: Path) -> None:
    write(tmp_path, "plain", torch.bfloat16)
    ids = prompt(CONTEXT)
    followed = Transformer.from_pretrained(tmp_path)
    assert followed.formats.weights == "bf16"
    assert followed.formats.latent.spec == "latent_bf16/32+8"
    exact = Transformer.from_pretrained(tmp_path, precision="fp32")
    assert exact.formats.index.spec == "index_fp32/16"
    apart = Transformer.from_pretrained(
        tmp_path, precision=Precision(weights="fp32", index_cache="fp8", latent_cache="bf16")
    )
    assert apart.formats.index.spec == "index_fp8/16"
    want = exact(ids)
    assert 0 < largest(apart(ids)[:, :8], want[:, :8]) < 0.1
    assert 0 < largest(followed(ids)[:, :8], want[:, :8]) < 0.5


def test_weights_can_be_quantised_on_loading(tmp_path: Path) -> None:
    wide = dict(
        hidden_size=128, intermediate_size=128, moe_intermediate_size=128, q_lora_rank=128,
        kv_lora_rank=128, v_head_dim=32, num_hidden_layers=2, first_k_dense_replace=2,
    )  # fmt: skip
    write(tmp_path, "plain", torch.bfloat16, **wide)
    ids = prompt(8)
    want = Transformer.from_pretrained(tmp_path, precision="fp32")(ids)
    model = Transformer.from_pretrained(tmp_path, precision="fp8")
    assert str(model.formats) == (
        "weights fp8, activations bfloat16, latents latent_fp8/128+8, index keys index_fp8/16"
    )
    got = model(ids)
    assert 0.01 < float((got - want).norm() / want.norm()) < 0.25


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ("fp8", "hidden_size is 64"),
        ("int4", "'int4'"),
        (Precision(latent_cache="fp8"), "kv_lora_rank is 32"),
    ],
)
def test_an_impossible_precision_is_refused(tmp_path: Path, wish: Any, words: str) -> None:
    write(tmp_path, "plain", num_hidden_layers=1)
    with pytest.raises(ConfigError, match=words):
        Transformer.from_pretrained(tmp_path, precision=wish)


# -- the rule that switches forms ----------------------------------------------------------------

PUBLISHED = ModelConfig(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
    num_hidden_layers=61, first_k_dense_replace=3, num_attention_heads=128, n_routed_experts=256,
    n_shared_experts=1, num_experts_per_tok=8, n_group=8, topk_group=4, q_lora_rank=1536,
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, index_n_heads=64,
    index_head_dim=128, index_topk=2048,
)  # fmt: skip


@pytest.mark.parametrize(
    ("queries", "context"), [(1, 1), (5, 5), (100, 3000), (3000, 3000), (4, 2050), (4096, 9000)]
)
def test_attention_flop_counts_pairs(queries: int, context: int) -> None:
    visible = range(context - queries + 1, context + 1)
    expand = 2 * 128 * 256 * 512
    mha, mqa = attention_flop(PUBLISHED, queries, context)
    assert mha == sum(visible) * 2 * 128 * (192 + 128) + context * expand
    assert mqa == sum(min(n, 2048) for n in visible) * 2 * 128 * 1088 + queries * expand


def test_forms_switch_where_their_costs_meet() -> None:
    """Without the expansion of the latents, which a long step shares among many queries, the two
    cost the same at 6963 visible keys."""
    mha, mqa = attention_flop(PUBLISHED, 1, 6963)
    expand = 2 * 128 * 256 * 512
    assert (mha - 6963 * expand) / (mqa - expand) == pytest.approx(1, rel=1e-4)
    assert prefers_mha(PUBLISHED, [(4096, 4096)])
    assert prefers_mha(PUBLISHED, [(12000, 12000)])
    assert not prefers_mha(PUBLISHED, [(16384, 16384)])
    assert not prefers_mha(PUBLISHED, [(1, 4096)])


def test_masks_that_cost_end_mha_where_selection_begins() -> None:
    assert prefers_mha(PUBLISHED, [(2048, 2048)], free_masks=False)
    assert not prefers_mha(PUBLISHED, [(2049, 2049)], free_masks=False)
    assert not prefers_mha(PUBLISHED, [(2048, 2048), (1, 4096)], free_masks=False)


def test_steps_are_filled_across_prompts() -> None:
    steps = list(pieces([5, 1, 9], [0, 0, 4], 4))
    assert steps == [
        [(0, 0, 4, False)],
        [(0, 4, 5, True), (1, 0, 1, True), (2, 4, 6, False)],
        [(2, 6, 9, True)],
    ]


# -- cache ---------------------------------------------------------------------------------------


@pytest.fixture
def cache() -> Iterator[KVCache]:
    layouts = KVLayout.parse("latent_fp32/4+2"), KVLayout.parse("index_fp32/4")
    yield KVCache(1, *layouts, num_pages=5, page_size=4)


def test_pages_are_taken_and_given_back(cache: KVCache) -> None:
    a, b = Context(), Context()
    cache.reserve(a, 9)
    cache.reserve(b, 4)
    assert cache.free_pages == 1
    assert cache.slots(a, 3, 6).tolist() == [a.pages[0] * 4 + 3, a.pages[1] * 4, a.pages[1] * 4 + 1]
    assert cache.block_table([b, a]).tolist() == [[*b.pages, 0, 0], a.pages]
    cache.reserve(b, 5)
    assert cache.block_table([b, a]).tolist() == [[*b.pages, 0], a.pages]
    assert not set(a.pages) & set(b.pages)
    cache.release(a)
    assert cache.free_pages == 3


def test_a_full_cache_says_so_and_takes_nothing(cache: KVCache) -> None:
    context = Context()
    with pytest.raises(BadInput, match="21 tokens needs 6 more pages of 4 tokens, but 5 of 5"):
        cache.reserve(context, 21)
    assert cache.free_pages == 5


# -- bad input -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> Transformer:
    folder = tmp_path_factory.mktemp("tiny")
    write(folder, "plain", num_hidden_layers=1)
    return Transformer.from_pretrained(folder, max_context=50)


@pytest.mark.parametrize(
    ("ids", "lengths", "words"),
    [
        (torch.zeros(1, 51, dtype=torch.int64), None, "51 tokens; this model takes 1 to 50"),
        (torch.zeros(1, 0, dtype=torch.int64), None, "lengths are .0."),
        (torch.tensor([[3, 199]]), None, "token id 199 is outside the vocabulary of 199"),
        (torch.tensor([[3, -1]]), None, "token id -1"),
        (torch.tensor([[0.5]]), None, "float32"),
        (torch.tensor([3]), None, "batch, tokens"),
        ([[3, 4]], None, "token ids are a list; expected a tensor"),
        (torch.tensor([[3, 4]]), [3], "lengths are .3."),
    ],
)
def test_bad_token_ids_are_refused(tiny: Transformer, ids: Any, lengths: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        tiny(ids, lengths)


def test_a_limit_beyond_the_config_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "plain", num_hidden_layers=1)
    with pytest.raises(ConfigError, match=r"max_context is 5000.*1 to 4096"):
        Transformer.from_pretrained(tmp_path, max_context=5000)


def test_every_op_names_its_implementation(pair: tuple[Transformer, Any]) -> None:
    served = pair[0].served
    attention = {"indexer_topk", "indexer_topk_paged", "mla_attention", "mha_prefill", "rope"}
    assert attention | {"route", "moe_experts", "linear", "add_rms_norm"} <= set(served)
    assert not any("reference" in label for label in served.values())


def test_loading_reports_progress(tmp_path: Path) -> None:
    write(tmp_path, "plain")
    seen: list[tuple[int, int]] = []
    Transformer.from_pretrained(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == seen[-1][1]
