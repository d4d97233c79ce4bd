"""Generation: against transformers' own, repeatable by seed, and bounded by what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import GEOMETRIES, one_thread, prompt, write

from dsa_hal.errors import BadInput
from dsa_hal.model import Transformer, generate
from dsa_hal.model.generate import Memory, Sampler

SAMPLED = dict(temperature=1.0, top_p=0.95, max_new_tokens=12, stop_ids=())


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Transformer:
    folder = tmp_path_factory.mktemp("generate")
    write(folder, "yarn", num_hidden_layers=2)
    return Transformer.from_pretrained(folder, max_context=70)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_64_greedy_tokens_are_those_of_transformers(geometry: str, tmp_path: Any) -> None:
    theirs = write(tmp_path, geometry)
    theirs.generation_config.eos_token_id = None
    ids = prompt(21)
    want = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False,
        pad_token_id=0, use_cache=True,
    )[0, 21:]  # fmt: skip
    ours = Transformer.from_pretrained(tmp_path)
    got = generate(ours, ids.tolist(), max_new_tokens=64, stop_ids=(), prefill_chunk=8)
    assert len(set(want.tolist())) > 1
    assert got == [want.tolist()]


def test_a_batch_continues_as_its_rows_alone(model: Transformer) -> None:
    prompts = [prompt(n, seed=n)[0].tolist() for n in (1, 40, 17)]
    together = generate(model, prompts, max_new_tokens=9, stop_ids=(), prefill_chunk=10)
    alone = [generate(model, [p], max_new_tokens=9, stop_ids=())[0] for p in prompts]
    assert together == alone


def test_a_seed_repeats_and_rows_do_not_disturb_each_other(model: Transformer) -> None:
    prompts = [prompt(n)[0].tolist() for n in (9, 12)]
    first = generate(model, prompts, seed=7, **SAMPLED)
    state = torch.get_rng_state()
    torch.rand(3)
    assert generate(model, prompts, seed=7, **SAMPLED) == first
    assert generate(model, prompts[:1], seed=7, **SAMPLED) == first[:1]
    assert generate(model, prompts, seed=8, **SAMPLED) != first
    torch.set_rng_state(state)
    before = torch.get_rng_state()
    generate(model, prompts, seed=7, **SAMPLED)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_stops_at_a_stop_token_and_leaves_it_out(model: Transformer) -> None:
    ids = prompt(10).tolist()
    free = generate(model, ids, max_new_tokens=8, stop_ids=())[0]
    end = free[5]
    seen: list[tuple[int, int]] = []
    got = generate(
        model, ids, max_new_tokens=8, stop_ids=[end], on_token=lambda *at: seen.append(at)
    )[0]
    assert got == free[: free.index(end)]
    assert seen == [(0, token) for token in got]


def test_it_stops_at_the_limit_of_the_context(model: Transformer) -> None:
    ids = [prompt(66)[0].tolist(), prompt(69)[0].tolist(), [5]]
    lengths = [len(new) for new in generate(model, ids, max_new_tokens=9, stop_ids=())]
    assert lengths == [4, 1, 9]


def test_progress_counts_prompt_tokens(model: Transformer) -> None:
    seen: list[tuple[int, int]] = []
    prompts = [prompt(5)[0].tolist(), prompt(8)[0].tolist()]
    generate(
        model, prompts, max_new_tokens=1, prefill_chunk=6, progress=lambda *at: seen.append(at)
    )
    assert seen == [(6, 13), (12, 13), (13, 13)]


def test_nothing_asked_nothing_made(model: Transformer) -> None:
    assert generate(model, []) == []
    assert generate(model, [[5]], max_new_tokens=0) == [[]]


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[]], {}, "0 tokens; this model takes 1 to 70"),
        ([[5] * 71], {}, "71 tokens"),
        ([[5] * 70], {}, "70 tokens leaves no room"),
        ([[5], [199]], {}, "token id 199"),
        ([[5]], dict(temperature=-0.1), "temperature is -0.1"),
        ([[5]], dict(repetition_penalty=0.0), "repetition_penalty is 0.0"),
        ([[5]], dict(temperature=float("nan")), "temperature is nan"),
        ([[5]], dict(temperature=float("inf")), "temperature is inf"),
        ([[5]], dict(top_p=0.0), "top_p is 0.0"),
        ([[5]], dict(top_p=1.5), "top_p is 1.5"),
        ([[5]], dict(top_p=float("nan")), "top_p is nan"),
        ([[5]], dict(max_new_tokens=-1), "max_new_tokens is -1"),
        ([[5]], dict(seed=-1), "seed is -1"),
        ([[5]], dict(prefill_chunk=0), "prefill chunk is 0"),
    ],
)
def test_bad_wishes_are_refused(model: Transformer, prompts: Any, options: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        generate(model, prompts, **options)


# -- the sampler ---------------------------------------------------------------------------------


def draws(sampler: Sampler, probabilities: list[float], count: int) -> list[int]:
    logits = torch.tensor(probabilities).log()
    return [sampler(0, logits, set()) for _ in range(count)]


def test_sampling_follows_the_probabilities() -> None:
    wanted = [0.1, 0.6, 0.3]
    got = torch.tensor(draws(Sampler(1.0, 1.0, 1.0, 3), wanted, 4000)).bincount(minlength=3) / 4000
    assert torch.allclose(got, torch.tensor(wanted), atol=0.04)


def test_temperature_sharpens() -> None:
    got = torch.tensor(draws(Sampler(0.5, 1.0, 1.0, 3), [0.25, 0.75], 4000)).float().mean()
    assert abs(float(got) - 0.9) < 0.03


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.5, {1}), (0.6001, {1, 2}), (0.9, {1, 2}), (1.0, {0, 1, 2})]
)
def test_top_p_keeps_the_fewest_likeliest_that_reach_it(top_p: float, kept: set[int]) -> None:
    assert set(draws(Sampler(1.0, top_p, 1.0, 3), [0.1, 0.6, 0.3], 500)) == kept


def test_a_tiny_temperature_is_greedy() -> None:
    assert draws(Sampler(1e-30, 1.0, 1.0, 0), [0.1, 0.6, 0.3], 20) == [1] * 20


def test_a_conversation_reads_only_what_is_new(model: Transformer) -> None:
    """Turn after turn, what is remembered changes the work and not the answer, also where the
    conversation goes back on itself and where the cache has to grow."""
    memory = Memory()
    said: list[int] = []
    turns = [prompt(20)[0].tolist(), prompt(28)[0].tolist()[::-1], [7, 8, 9]]
    for at, turn in enumerate(turns):
        asked = [*said, *turn]
        answer = generate(model, [asked], max_new_tokens=6, stop_ids=(), memory=memory)[0]
        assert answer == generate(model, [asked], max_new_tokens=6, stop_ids=())[0]
        assert memory.reused == max(0, len(said) - 1), f"turn {at}"  # its last token was not fed
        said = [*asked, *answer]
    branch = [*said[:30], 5, 6]
    answer = generate(model, [branch], max_new_tokens=5, stop_ids=(), memory=memory)[0]
    assert memory.reused == 30
    assert answer == generate(model, [branch], max_new_tokens=5, stop_ids=())[0]
    same = generate(model, [branch], max_new_tokens=5, stop_ids=(), memory=memory)[0]
    assert same == answer and memory.reused == len(branch) - 1
    with pytest.raises(BadInput, match="there are 2 prompts; a memory belongs to one"):
        generate(model, [branch, branch], memory=memory)


def test_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    process, generator = RepetitionPenaltyLogitsProcessor(1.7), torch.Generator().manual_seed(0)
    moved = 0
    for _ in range(200):
        logits = torch.randn(12, generator=generator)
        so_far = torch.randint(12, (1, 8), generator=generator)
        want = int(process(so_far, logits[None])[0].argmax())
        assert Sampler(0.0, 1.0, 1.7, 0)(0, logits, set(so_far[0].tolist())) == want
        moved += want != int(logits.argmax())
    assert moved > 20
