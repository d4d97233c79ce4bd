"""`dsa_hal.model.quality` against plain formulations of what it measures, and the report itself."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import one_thread
from random_model import CONFIG, byte_tokenizer, random_tensors
from safetensors.torch import save_file
from torch import Tensor

from dsa_hal.cli import main
from dsa_hal.errors import BadInput
from dsa_hal.model import ModelConfig, Precision, Transformer
from dsa_hal.model.quality import haystack, heldout
from dsa_hal.model.quality import perplexity as perplexities
from dsa_hal.model.quality.haystack import find, haystacks
from dsa_hal.model.quality.needle import ADJECTIVES, NOUNS, draw, is_heldout
from dsa_hal.model.quality.perplexity import losses, perplexity
from dsa_hal.model.quality.recall import masses, recall
from dsa_hal.model.quality.report import PARTS, measure, plan, subject
from dsa_hal.model.quality.selectors import drawn, recent, selecting
from dsa_hal.model.tokenizer import Tokenizer

TOPK, CONTEXT = 16, 80
TINY = replace(
    CONFIG, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    q_lora_rank=128, kv_lora_rank=128, index_n_heads=16, index_topk=TOPK, n_routed_experts=4,
    n_group=2, topk_group=1, num_experts_per_tok=2, max_position_embeddings=1024,
    rope=replace(CONFIG.rope, type="default"),
)  # fmt: skip
"""With fewer index heads many scores are exactly 0, and steps of other sizes may choose others."""

WORDS = "the sun rose over a quiet river and nobody saw how the small boat drifted away. "


def write(folder: Path, config: ModelConfig = TINY) -> Path:
    """A random checkpoint with a byte tokenizer."""
    folder.mkdir()
    save_file(dict(random_tensors(config, 3)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> Path:
    return write(tmp_path_factory.mktemp("quality") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: Any) -> Path:
    """Two texts of a held-out sample."""
    file: Path = tmp_path_factory.mktemp("text") / "sample.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in (WORDS * 9, WORDS[4:] * 3)))
    return file


@pytest.fixture(scope="module")
def model(tiny: Path) -> Transformer:
    return Transformer.from_pretrained(tiny, precision="fp32")


@pytest.fixture(scope="module")
def windows(tiny: Path, text: Path) -> list[Tensor]:
    tokenizer = Tokenizer.load(tiny)
    return heldout.windows(heldout.tokens(text, tokenizer), CONTEXT, 3, 0, tokenizer.bos_id)


# -- text ----------------------------------------------------------------------------------------


def test_windows_are_exact_distinct_and_follow_the_seed(tiny: Path, text: Path) -> None:
    tokenizer = Tokenizer.load(tiny)
    tokens = heldout.tokens(text, tokenizer)
    assert len(tokens) == 2 + len(WORDS) * 9 + len(WORDS[4:]) * 3
    assert (tokens == tokenizer.bos_id).nonzero()[:, 0].tolist() == [0, 1 + len(WORDS) * 9]

    def cut(seed: int) -> list[list[int]]:
        return [w.tolist() for w in heldout.windows(tokens, 50, 7, seed, tokenizer.bos_id)]

    places = [tokens[at : at + 50].tolist()[1:] for at in range(0, len(tokens) - 49, 50)]
    assert all(len(w) == 50 and w[0] == tokenizer.bos_id for w in cut(0))
    assert len({places.index(w[1:]) for w in cut(0)}) == 7
    assert cut(0) == cut(0) != cut(1)


# -- selectors -----------------------------------------------------------------------------------


def logits(model: Transformer, window: Tensor) -> Tensor:
    """Of a window whose last five tokens are decoded, the others prefilled in chunks."""
    cache, contexts = model.new_cache([len(window)])
    steps = model.prefill(cache, contexts, [window[:-5]], chunk=32, every=True)
    parts = [rows for _, rows in steps]
    parts += [model.decode(cache, contexts, token[None])[0] for token in window[-5:].split(1)]
    return torch.cat(parts)


def test_dense_is_a_model_that_selects_everything(
    model: Transformer, windows: list[Tensor], tmp_path: Path
) -> None:
    everything = replace(TINY, index_topk=CONTEXT)
    other = Transformer.from_pretrained(write(tmp_path / "dense", everything), precision="fp32")
    want = logits(other, windows[0])
    with selecting(model, "dense"):
        assert (logits(model, windows[0]) - want).abs().max() < 1e-4
    own = logits(model, windows[0])
    assert (own - want)[:TOPK].abs().max() < 1e-4
    assert (own - want)[TOPK:].abs().max() > 0.1


def test_recent_keys_are_a_sliding_window(windows: list[Tensor], tmp_path: Path) -> None:
    """In a model of one layer, no token from further back has any influence."""
    one = replace(TINY, num_hidden_layers=1)
    model = Transformer.from_pretrained(write(tmp_path / "one", one), precision="fp32")
    changed = windows[0].clone()
    changed[20] = 7
    for selector, reach in (("recent", 20 + TOPK), ("dense", CONTEXT)):
        with selecting(model, selector):
            moved = (logits(model, windows[0]) - logits(model, changed)).abs().amax(-1)
        assert moved[:20].max() < 1e-5 and moved[20:reach].min() > 1e-4
        assert not moved[reach:].numel() or moved[reach:].max() < 1e-5
    assert recent(torch.tensor([3], dtype=torch.int32), torch.tensor([5]), 4).tolist() == [
        [4, 3, -1, -1]
    ]


def test_random_keys_are_drawn_evenly_from_those_visible() -> None:
    choose = drawn(5, torch.device("cpu"))
    ks = torch.tensor([2, 2, 0], dtype=torch.int32).repeat(400)
    ke = torch.tensor([12, 5, 0], dtype=torch.int32).repeat(400)
    rows = choose(ks, ke, 4)
    assert rows.dtype == torch.int32 and rows.shape == (1200, 4)
    wide, few, none = (rows[at::3] for at in range(3))
    assert torch.equal(few.sort(-1).values, torch.tensor([[-1, 2, 3, 4]]).expand(400, 4))
    assert (none == -1).all()
    assert all(len(set(row)) == 4 for row in wide.tolist())
    share = torch.bincount(wide.flatten(), minlength=12)[2:] / 400
    assert ((share - 0.4).abs() < 0.1).all()


def test_a_random_selection_follows_the_seed_and_the_model_comes_back(
    model: Transformer, windows: list[Tensor]
) -> None:
    own, config, ops = logits(model, windows[0]), model.config, dict(vars(model.attention_ops))

    def randomly(seed: int) -> Tensor:
        with selecting(model, "random", seed):
            return logits(model, windows[0])

    assert torch.equal(randomly(1), randomly(1))
    assert (randomly(1) - randomly(2))[TOPK:].abs().max() > 0.1
    assert (randomly(1) - own)[TOPK:-5].abs().max() > 0.1
    assert (randomly(1) - own)[-5:].abs().max() > 0.1
    with pytest.raises(ZeroDivisionError), selecting(model, "dense"):
        _ = 1 // 0
    with pytest.raises(BadInput, match="unknown selector 'best'"), selecting(model, "best"):
        pass
    assert model.config is config and vars(model.attention_ops) == ops
    assert torch.equal(logits(model, windows[0]), own)


# -- perplexity ----------------------------------------------------------------------------------


def test_perplexity_is_plain_cross_entropy(
    model: Transformer, windows: list[Tensor], monkeypatch: Any
) -> None:
    whole = model(torch.stack(windows))
    log_p = whole[:, :-1].double().log_softmax(-1)
    want = -log_p.gather(-1, torch.stack(windows)[:, 1:, None])[..., 0]
    monkeypatch.setattr(perplexities, "LOGITS", 4 * TINY.vocab_size * 13)  # steps of 13 tokens
    rows = torch.stack([losses(model, window) for window in windows])
    assert rows.shape == (3, CONTEXT - 1) and (rows - want).abs().max() < 1e-3
    read: list[int] = []
    got = perplexity(model, windows, weights="fp32", selector="dsa", advance=read.append)
    assert read == [CONTEXT] * 3 and got.tokens == 3 * (CONTEXT - 1)
    assert got.whole == pytest.approx(float(want.mean().exp()), rel=1e-4)
    assert got.late == pytest.approx(float(want[:, 59:].mean().exp()), rel=1e-4)
    assert got.positions[1] == pytest.approx(float(want[:, 10:20].mean().exp()), rel=1e-4)
    assert len(got.positions) == 8
    other = perplexity(model, windows, weights="fp32", selector="random")
    assert abs(other.late / got.late - 1) > 1e-3
    assert other / got == (other.whole / got.whole, other.late / got.late)


# -- recall --------------------------------------------------------------------------------------


def test_masses_of_a_case_worked_out_by_hand() -> None:
    """One head gives its keys 1, 2, 3, 4, 10 parts of 20; the other gives each a fifth."""
    parts = torch.tensor([1.0, 2, 3, 4, 10])
    k = torch.stack([parts.log() / 0.5, torch.zeros(5)], 1)[..., None]
    q = torch.ones(3, 2, 1)
    ks, ke = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([5, 4, 5], dtype=torch.int32)
    indices = torch.tensor([[1, 4], [2, -1], [3, 4]], dtype=torch.int32)
    got = masses(q, k, ks, ke, indices, softmax_scale=0.5)
    want = [  # the third query sees two keys and needs no selection
        [(12 / 20 + 2 / 5) / 2, (14 / 20 + 2 / 5) / 2, (14 / 20 + 2 / 5) / 2],
        [(3 / 9 + 1 / 3) / 2, (7 / 9 + 2 / 3) / 2, (7 / 9 + 2 / 3) / 2],
    ]
    assert torch.allclose(got, torch.tensor(want))
    twice = torch.tensor([[4, 4], [2, 3], [3, 4]], dtype=torch.int32)
    assert masses(q, k, ks, ke, twice, softmax_scale=0.5)[0, 0] == pytest.approx(
        (10 / 20 + 0.2) / 2
    )


def test_recall_is_that_of_the_absorbed_form(
    model: Transformer, windows: list[Tensor], monkeypatch: Any
) -> None:
    """Probabilities worked out from queries and latents, as decoding has them."""
    shares: list[list[Tensor]] = [[], []]
    nope, rank, scale = TINY.qk_nope_head_dim, TINY.kv_lora_rank, TINY.softmax_scale

    def listen(layer: int, own: Any) -> Any:
        def mla(q: Tensor, kv_b: Tensor, kv: Tensor, indices: Tensor, **options: Any) -> Tensor:
            absorbed = torch.einsum("thn,hnr->thr", q[..., :nope], kv_b[:, :nope])
            scores = torch.einsum("thr,cr->htc", absorbed, kv[:, :rank])
            scores = (scores + torch.einsum("thr,cr->htc", q[..., nope:], kv[:, rank:])) * scale
            first = len(kv) - len(q)
            unseen = torch.ones(len(q), len(kv), dtype=torch.bool).triu(first + 1)
            p = scores.masked_fill(unseen, -torch.inf).softmax(-1).mean(0)
            for row in range(len(q)):
                if first + row + 1 > TOPK:
                    seen = p[row, : first + row + 1]
                    held = seen[indices[row].long()].sum(), seen[-TOPK:].sum()
                    best = seen.sort(descending=True).values[:TOPK].sum()
                    shares[layer].append(torch.stack([*held, best]))
            result: Tensor = own(q, kv_b, kv, indices, **options)
            return result

        return mla

    got = recall(model, windows)
    assert got.topk == TOPK and got.queries == 3 * (CONTEXT - TOPK)
    monkeypatch.setattr(model, "form", "mqa")
    for layer, block in enumerate(model.blocks):
        monkeypatch.setattr(block.attention, "_mla", listen(layer, block.attention._mla))
    for window in windows:
        cache, contexts = model.new_cache([CONTEXT])
        for _ in model.prefill(cache, contexts, [window]):
            pass
    for mass, rows in zip(got.layers, shares, strict=True):
        assert len(rows) == got.queries
        want = torch.stack(rows).mean(0).tolist()
        assert [mass.selected, mass.recent, mass.best] == pytest.approx(want, abs=1e-4)
        assert mass.best > mass.selected and mass.best > mass.recent
    assert got.whole.selected == pytest.approx(sum(m.selected for m in got.layers) / 2)


def test_recall_of_other_selectors(model: Transformer, windows: list[Tensor]) -> None:
    own = recall(model, windows)
    with selecting(model, "recent"):
        latest = recall(model, windows)
    assert all(mass.selected == pytest.approx(mass.recent) for mass in latest.layers)
    with selecting(model, "random"):
        assert recall(model, windows).whole.selected != pytest.approx(own.whole.selected, abs=1e-3)
    with pytest.raises(BadInput, match="longer than the 16 keys"):
        recall(model, [windows[0][:TOPK]])


# -- needles -------------------------------------------------------------------------------------


def test_no_pair_that_is_asked_for_is_ever_trained() -> None:
    pick = random.Random(0)
    drawn = {half: [draw(pick, half) for _ in range(4000)] for half in (False, True)}
    pairs = {half: {(n.adjective, n.noun) for n in drawn[half]} for half in drawn}
    assert not pairs[False] & pairs[True]
    assert len(pairs[True]) > 1000 < len(pairs[False])
    for half in (False, True):
        assert {a for a, _ in pairs[half]} == set(ADJECTIVES)
        assert {n for _, n in pairs[half]} == set(NOUNS)
        assert all(is_heldout(a, n) == half for a, n in pairs[half])
    for needle in drawn[True][:50]:
        assert re.fullmatch(r"\d{5}", needle.answer)
        assert needle.statement == f"{needle.question} {needle.answer}."
    halves = [is_heldout(a, n) for a in ADJECTIVES for n in NOUNS]
    assert sum(halves) * 2 == len(halves)
    assert draw(random.Random(3), True) == draw(random.Random(3), True)


def test_haystacks_have_their_length_and_needles_their_depth(tiny: Path, text: Path) -> None:
    tokenizer = Tokenizer.load(tiny)
    tokens = heldout.tokens(text, tokenizer)
    depths = (50, 0, 100, 33)
    stacks = haystacks(tokens, tokenizer, (300, 500), depths, 2, seed=1)
    assert [stack.length for stack in stacks] == [300, 300, 500, 500]
    assert len({stack.tokens for stack in stacks}) == 4
    for stack in stacks:
        asked = [f"\n{n.question} {n.answer}" for n in stack.needles]  # a token is a byte
        assert len(stack.tokens) + max(map(len, asked)) == stack.length
        assert len(set(asked)) == 4 and all(is_heldout(n.adjective, n.noun) for n in stack.needles)
        rest = list(stack.tokens)
        for depth, needle in sorted(zip(depths, stack.needles, strict=True), reverse=True):
            hidden = tokenizer.encode(f"\n{needle.statement}\n", add_bos=False)
            places = [i for i in range(len(rest)) if rest[i : i + len(hidden)] == hidden]
            assert len(places) == 1
            del rest[places[0] : places[0] + len(hidden)]
            before = places[0] - 1 - sum(
                len(n.statement) + 2
                for d, n in zip(depths, stack.needles, strict=True)
                if d < depth
            )  # fmt: skip
            room = stack.length - max(map(len, asked)) - 1
            room -= sum(len(n.statement) + 2 for n in stack.needles)
            assert before == round(room * depth / 100)
        assert rest[0] == tokenizer.bos_id
        filler = rest[1:]
        assert any(tokens[at : at + len(filler)].tolist() == filler for at in range(len(tokens)))


def test_found_is_what_a_reader_answers_right(
    model: Transformer, tiny: Path, text: Path, monkeypatch: Any
) -> None:
    """Stand-ins for the model: one that reads, one that takes the first code it sees."""
    tokenizer = Tokenizer.load(tiny)
    stacks = haystacks(heldout.tokens(text, tokenizer), tokenizer, (250, 400), (0, 90), 3, 0)

    def answering(pattern: str) -> Any:
        def answer(_: Transformer, prompts: list[list[int]], **options: Any) -> list[list[int]]:
            *_, question = tokenizer.decode(prompts[0]).rsplit("\n", 1)
            found = re.search(pattern.format(re.escape(question)), tokenizer.decode(prompts[0]))
            assert found is not None
            return [tokenizer.encode(" " + found[1], add_bos=False)[: options["max_new_tokens"]]]

        return answer

    monkeypatch.setattr(haystack, "generate", answering(r"{} (\d{{5}})\."))
    read: list[int] = []
    got = find(model, tokenizer, stacks, selector="dsa", advance=read.append)
    assert got.found == ((3, 3), (3, 3)) and got.share == 1 and read == [250] * 3 + [400] * 3
    monkeypatch.setattr(haystack, "generate", answering(r" is (\d{{5}})\."))
    assert find(model, tokenizer, stacks, selector="dsa").found == ((3, 0), (3, 0))


def test_a_random_model_finds_no_needle(model: Transformer, tiny: Path, text: Path) -> None:
    tokenizer = Tokenizer.load(tiny)
    stacks = haystacks(heldout.tokens(text, tokenizer), tokenizer, (160,), (50,), 1, 0)
    for selector in ("dsa", "dense", "random"):
        assert find(model, tokenizer, stacks, selector=selector).found == ((0,),)


# -- the report ----------------------------------------------------------------------------------


def test_everything_is_measured_with_the_weights_that_the_report_names(
    tiny: Path, text: Path, windows: list[Tensor], tmp_path: Path
) -> None:
    options: dict[str, Any] = dict(
        parts=PARTS, context=CONTEXT, windows=3, seed=0, lengths=(160,), depths=(50,), samples=1
    )
    asked = subject(tiny)
    seen: list[tuple[int, int]] = []
    result = measure(asked, plan(asked, text, **options), lambda *step: seen.append(step))
    assert seen[-1][0] == seen[-1][1] == CONTEXT * 3 * 6 + 160 * 3
    lines = {(p.weights, p.selector): p for p in result.perplexity}
    fp8 = Transformer.from_pretrained(tiny)
    bf16 = Transformer.from_pretrained(tiny, precision=Precision(weights="bf16"))
    for name, model, selector in (("fp8", fp8, "dsa"), ("unquantised", bf16, "dense")):
        want = perplexity(model, windows, weights=name, selector=selector)
        assert lines[name, selector] == want
    assert lines["fp8", "dsa"].whole != lines["unquantised", "dsa"].whole
    assert "bf16 arithmetic" in result.weights["unquantised"] and result.stored == "fp8"
    assert result.recall == recall(fp8, windows)
    record = json.loads(json.dumps(result.to_json()))
    line = record["perplexity"][2]
    assert line["against"] == {"weights": "unquantised", "selector": "dsa"}
    assert line["times"] == lines["fp8", "dsa"].whole / lines["unquantised", "dsa"].whole
    assert [n["selector"] for n in record["needles"]] == ["dsa", "dense", "random"]


def test_weights_that_are_not_fp8(tiny: Path, text: Path, tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", replace(TINY, quant=None))
    rounded = subject(plain)
    assert rounded.stored.name == "unquantised" and not isinstance(rounded.other, str)
    assert (rounded.other.name, rounded.other.precision) == ("fp8", "fp8")
    given = subject(tiny, plain).other
    assert not isinstance(given, str) and given.path == plain and given.precision is None
    with pytest.raises(BadInput, match="compared with an unquantised one"):
        subject(plain, tiny)
    odd = replace(TINY, quant=None, hidden_size=96, num_hidden_layers=1)
    lone = subject(write(tmp_path / "odd", odd))
    assert isinstance(lone.other, str) and "hidden_size is 96" in lone.other
    options: dict[str, Any] = dict(windows=1, seed=0, lengths=(), depths=(), samples=1)
    wanted = plan(lone, text, parts=("perplexity",), context=40, **options)
    result = measure(lone, wanted)
    assert result.notes == (lone.other,) and len(result.perplexity) == 4
    assert result.recall is None and result.needles == ()


def test_the_command_writes_tables_json_and_a_picture(
    tiny: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    files = tmp_path / "q.json", tmp_path / "q.png"
    words = ["report", "quality", "--model", tiny, "--text", text, "--context", CONTEXT,
             "--windows", 2, "--needle-lengths", "160,200", "--needle-depths", "0,100",
             "--samples", 1, "--backend", "cpu", "npu", "--json", files[0], "--plot",
             files[1]]  # fmt: skip
    assert main(list(map(str, words))) == 0
    out = capsys.readouterr().out
    assert "random 16" in out and "16 latest" in out and "DSA, 100% deep" in out
    assert "npu: not measured: backend npu was asked for" in out
    record = json.loads(files[0].read_text())
    assert record["selected_keys"] == TOPK and len(record["results"]) == 2
    assert len(record["results"][0]["perplexity"]) == 5
    assert record["results"][1]["backend"] == "npu"
    assert files[1].read_bytes().startswith(b"\x89PNG") and files[1].stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {"q.json", "q.png"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), r"has no heldout.jsonl; name a text .* with --text"),
        (("--text", "nowhere.txt", "--context", "80"), r"nowhere.txt cannot be read"),
        (("--text", "{text}", "--parts", "perplexity,speed"), r"unknown part 'speed'; known are"),
        (("--text", "{text}", "--context", "1000"), r"and 3 windows of 1000 need 3000"),
        (("--text", "{text}", "--context", "16"), r"context is 16 tokens; .* from 17 to 1024"),
        (("--text", "{text}", "--context", "5000"), r"context is 5000 tokens"),
        (("--text", "{text}", "--context", "80"), r"haystack of 10 tokens is too short: 5 needles"),
        (("--text", "{text}", "--context", "80", "--needle-lengths", "2000"), r"takes 1024"),
        (("--text", "{text}", "--json", "/nowhere/q.json"), r"cannot write /nowhere/q.json"),
        (("--text", "{text}", "--context", "80", "--parts", "recall", "--backend", "npu"),
         r"backend npu was asked for, but"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_said_before_anything_is(
    tiny: Path, text: Path, words: tuple[str, ...], sentence: str, capsys: Any
) -> None:
    spoken = [word.format(text=text) for word in words]
    assert main(["report", "quality", "--model", str(tiny), *spoken]) == 2
    told = capsys.readouterr()
    assert told.out == "" and re.search(sentence, told.err), told.err
    assert told.err.count("\n") == 1


def test_a_picture_without_matplotlib(tiny: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.delitem(sys.modules, "dsa_hal.cli.picture", raising=False)
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", "quality", "--model", str(tiny), "--plot", "q.png"]) == 2
    assert "pip install 'dsa-hal[report]'" in capsys.readouterr().err
