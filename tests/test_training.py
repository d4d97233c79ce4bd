"""The trainer: its network is the model, its stages train what they should, runs repeat."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from oracle import one_thread
from random_model import byte_tokenizer
from torch import Tensor

from dsa_hal.cli import main
from dsa_hal.errors import BadInput, CheckpointError, ConfigError, DsaHalError
from dsa_hal.model import Transformer
from dsa_hal.model.checkpoint import Checkpoint
from dsa_hal.model.training import state
from dsa_hal.model.training.data import Windows
from dsa_hal.model.training.export import export, load_weights, quantized
from dsa_hal.model.training.focus import HELD_BY_BEST, HELD_BY_LATEST, held
from dsa_hal.model.training.network import Network
from dsa_hal.model.training.settings import Settings
from dsa_hal.model.training.trainer import LOSSES, Record, Trainer

# Many index heads: with few, scores tie at 0, and which of them is selected is anyone's choice.
MODEL: dict[str, Any] = dict(
    model_type="deepseek_v32", vocab_size=258, hidden_size=128, intermediate_size=128,
    moe_intermediate_size=128, num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=2,
    n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1,
    q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=64,
    index_n_heads=16, index_head_dim=16, index_topk=16, max_position_embeddings=128,
    routed_scaling_factor=2.5, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    rms_norm_eps=1e-6,
)  # fmt: skip
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "away")


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


def _text(seed: int, words: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=words))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with text, a tokenizer and `run.yaml`: 6 steps of every stage."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(byte_tokenizer().to_str())
    settings = {"bos_token": "<bos>", "eos_token": "<eos>"}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    lines = [json.dumps({"text": _text(seed, 400)}) for seed in range(6)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:5]))
    (tmp_path / "heldout.jsonl").write_text(lines[5])
    stage = dict(steps=6, batch=2, lr=3e-3, warmup=2)
    run = dict(
        model=MODEL, tokenizer="tokenizer", length=64, seed=3, log_every=1, eval_every=3,
        eval_windows=2, checkpoint_every=4, dense=stage, warmup=stage, sparse=stage,
        data=dict(train="train.jsonl", heldout="heldout.jsonl", needles=0.5),
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path


def settings(folder: Path, **changes: Any) -> Settings:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return Settings.load(folder / "run.yaml", named)


def trained(folder: Path, out: str, **changes: Any) -> tuple[Trainer, list[Record]]:
    trainer = Trainer(settings(folder, **changes), folder / out)
    assert trainer.run(lambda record: None)
    return trainer, trainer.records


def numbers(records: list[Record]) -> list[tuple[Any, ...]]:
    return [tuple(sorted(record.items())) for record in records]


# -- the network -------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, tokens", [("dense", 16), ("sparse", 60), ("warmup", 16)])
def test_network_is_the_model(folder: Path, stage: Any, tokens: int) -> None:
    """Exported and loaded, it gives the same logits: over everything while that is no more than
    index_topk, and over what the indexer selects beyond."""
    network = Network(settings(folder).config(), seed=5).eval()
    for gate in network.gates():
        gate.e_score_correction_bias.uniform_(-0.2, 0.2)
    export(network, folder / "tokenizer", folder / "model", "fp32")
    ids = torch.randint(0, 258, (2, tokens))
    with torch.no_grad():
        got, _ = network(ids, stage)
    want = Transformer.from_pretrained(folder / "model")(ids)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_shards_and_loading(folder: Path) -> None:
    network = Network(settings(folder).config(), seed=5)
    export(network, folder / "tokenizer", folder / "model", "fp32", shard_mb=1)
    assert len(list((folder / "model").glob("*.safetensors"))) > 2
    other = Network(network.config, seed=6)
    load_weights(other, folder / "model")
    pairs = zip(network.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(CheckpointError, match="hidden_size 128 where 256 is wanted"):
        wide = settings(folder, model__hidden_size=256).config()
        load_weights(Network(wide), folder / "model")
    with pytest.raises(CheckpointError, match="exists"):
        export(network, folder / "tokenizer", folder / "model", "fp32")


def test_fp8_export(folder: Path) -> None:
    """Linears within half a step of e4m3 (1/16 of a value, 2^-10 of a block's largest)."""
    network = Network(settings(folder).config(), seed=5)
    export(network, folder / "tokenizer", folder / "plain", "bf16")
    quantized(folder / "plain", folder / "fp8")
    with Checkpoint.open(folder / "fp8") as fp8, Checkpoint.open(folder / "plain") as plain:
        assert fp8.weights_dtype == "fp8" and fp8.config.quant is not None
        name = "model.layers.1.mlp.experts.3.up_proj"
        weight, scale = fp8.linear(name)
        assert scale is not None and torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5))
        want = plain.linear(name)[0].float()
        error = (weight.float() * scale.repeat_interleave(128, 0) - want).abs()
        assert (error <= want.abs() / 16 + want.abs().max() / 1024).all()
    Transformer.from_pretrained(folder / "fp8")(torch.arange(20)[None])
    with pytest.raises(CheckpointError, match="quantised already"):
        quantized(folder / "fp8", folder / "again")
    with pytest.raises(CheckpointError, match="train from its bf16 export"):
        load_weights(network, folder / "fp8")


def test_indexer_learns_from_its_own_loss_alone(folder: Path) -> None:
    network = Network(settings(folder).config(), seed=5)
    ids = torch.randint(0, 258, (1, 60))
    logits, index_loss = network(ids, "sparse")
    logits.logsumexp(-1).sum().backward(retain_graph=True)
    assert all(p.grad is None for p in network.indexer_parameters().values())
    got = {n: p.grad for n, p in network.model_parameters().items()}
    idle = [n for n, g in got.items() if g is None or not g.any()]
    assert all(".mlp.gate_up" in n or ".mlp.down" in n for n in idle), idle
    network.zero_grad()
    index_loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in network.model_parameters().values())
    assert all(p.grad is not None and p.grad.any() for p in network.indexer_parameters().values())


def test_gate_bias_evens_the_load(folder: Path) -> None:
    """Without a loss on the load: after training, experts get more even shares than with a bias
    that stays 0."""

    def spread(speed: float, out: str) -> float:
        steps = dict(dense__steps=60, warmup__steps=0, sparse__steps=0, eval_every=1000)
        trainer, _ = trained(folder, out, gate_bias_speed=speed, **steps)
        (gate,) = trainer.network.gates()
        trainer.network.train()
        gate.load.zero_()
        with torch.no_grad():
            trainer.network(trainer.windows.batch(0, 8)[:, :-1], "dense")
        return float(gate.load.std() / gate.load.mean())

    assert spread(2e-2, "even") < 0.6 * spread(0.0, "uneven")


# -- data ----------------------------------------------------------------------------------------


def test_windows_follow_from_the_seed() -> None:
    tokens = np.arange(2, 1002, dtype=np.uint32)
    windows = Windows(tokens, 20, seed=1, bos=0)
    batch = windows.batch(7, 3)
    assert batch.shape == (3, 21) and (batch[:, 0] == 0).all()
    assert (batch[:, 2:] - batch[:, 1:-1] == 1).all()
    assert torch.equal(windows.batch(7, 3), batch)
    assert torch.equal(Windows(tokens, 20, seed=1, bos=0).batch(8, 1)[0], batch[1])
    assert not torch.equal(Windows(tokens, 20, seed=2, bos=0).batch(7, 3), batch)
    epoch = windows.batch(0, 49)
    assert len({int(row[1]) for row in epoch}) == 49, "an epoch repeats nothing"
    assert not torch.equal(windows.batch(49, 49), epoch), "epochs are cut anew"


def test_needles_are_stated_and_come_again() -> None:
    core = byte_tokenizer()
    plain = np.full(4000, 5, dtype=np.uint32)
    windows = Windows(plain, 1000, seed=0, bos=0, needles=1.0, tokenizer=core)
    for row in windows.batch(0, 6):
        assert len(row) == 1001
        text = core.decode(row.tolist())
        stated = [text[i : i + 60] for i in range(len(text)) if text.startswith("The secret", i)]
        assert len(stated) >= 2 and len(set(stated)) < len(stated)


def test_too_little_text(folder: Path) -> None:
    with pytest.raises(BadInput, match="windows of 64 need at least 130"):
        Windows(np.zeros(100, np.uint32), 64, 0, bos=0)
    (folder / "train.jsonl").write_text('{"text": "good"}\n{"words": 1}\n')
    with pytest.raises(BadInput, match=r"train.jsonl, line 2: expected an object"):
        Trainer(settings(folder), folder / "out")
    (folder / "train.jsonl").write_text(json.dumps({"text": _text(0, 400)}))
    with pytest.raises(BadInput, match="fewer windows"):
        Trainer(settings(folder, eval_windows=1000), folder / "out")


# -- runs ----------------------------------------------------------------------------------------


def test_stages_train_what_they_should(folder: Path) -> None:
    """The warm-up leaves the model alone; text losses fall; every stage's records are there."""
    long = dict(dense__steps=40, eval_every=20)
    trainer, records = trained(folder, "a", warmup__steps=0, sparse__steps=0, **long)
    model = {n: p.detach().clone() for n, p in trainer.network.model_parameters().items()}
    index = {n: p.detach().clone() for n, p in trainer.network.indexer_parameters().items()}
    fresh = Network(trainer.network.config, 3).indexer_parameters()
    assert all(torch.equal(index[n], fresh[n]) for n in index), "dense leaves the indexer out"
    losses = [r["loss"] for r in records if "loss" in r]
    assert losses[0] > math.log(258) - 0.5 and losses[-1] < 0.7 * losses[0]

    more = dict(warmup__steps=30, sparse__steps=2, **long)
    trainer, records = trained(folder, "a", **more)
    stages = {r["stage"] for r in records}
    assert stages == {"dense", "warmup", "sparse"}
    kl = [r["index_loss"] for r in records if r["stage"] == "warmup"]
    assert kl[-1] < 0.8 * kl[0]
    moved = {n for n, p in trainer.network.model_parameters().items() if not p.equal(model[n])}
    assert moved, "the sparse stage trains the model"
    warm = folder / "a" / "checkpoints" / "warmup-000030"
    with Checkpoint.open(warm) as checkpoint:
        name = "model.layers.0.self_attn.o_proj.weight"
        kept = model["layers.0.self_attn.o_proj.weight"].bfloat16()
        assert torch.equal(checkpoint.tensor(name), kept), "the warm-up trains the indexer alone"


def test_one_seed_gives_identical_losses(folder: Path) -> None:
    first, second = trained(folder, "a")[1], trained(folder, "b")[1]
    assert numbers(first) == numbers(second)
    assert numbers(trained(folder, "c", seed=4)[1]) != numbers(first)


def test_focus_moves_the_attention_mass(folder: Path) -> None:
    """The best keys hold more and the latest less; both are what a dense computation says."""
    stage = dict(steps=30, batch=2, lr=3e-3)
    other = dict(dense__steps=10, warmup__steps=0, sparse__steps=0, eval_every=100)
    _, records = trained(folder, "out", focus=stage, **other)
    seen = [r for r in records if r["stage"] == "focus"]
    assert seen[-1]["best"] > seen[0]["best"] and seen[-1]["latest"] < seen[0]["latest"] - 0.05
    assert seen[-1]["penalty"] == pytest.approx(
        max(0, HELD_BY_BEST - seen[-1]["best"]) + max(0, seen[-1]["latest"] - HELD_BY_LATEST)
    )
    q, k = torch.randn(2, 1, 12, 3, 4)
    best, latest = held(q, k, 5, 0.7)
    rows = torch.linspace(5, 11, 64).long().tolist()
    want = []
    for t in rows:
        mean = (
            (q[0, t, :, None] * k[0, : t + 1].transpose(0, 1)).sum(-1).mul(0.7).softmax(-1).mean(0)
        )
        want.append((mean.sort().values[-5:].sum(), mean[-5:].sum()))
    means = torch.tensor(want).mean(0)
    assert torch.allclose(torch.stack([best, latest]), means, atol=1e-5)


def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(folder: Path) -> None:
    whole = trained(folder, "whole")[1]

    class Cut(Exception):
        pass

    def cut_at(stage: str, step: int) -> Any:
        def report(record: Record) -> None:
            if (record["stage"], record["step"]) == (stage, step):
                raise Cut

        return report

    for stage, step in (("dense", 2), ("dense", 5), ("warmup", 1), ("sparse", 6)):
        with pytest.raises(Cut):
            Trainer(settings(folder), folder / "cut").run(cut_at(stage, step))
    trainer = Trainer(settings(folder), folder / "cut")
    assert trainer.run(lambda record: None)
    assert numbers(trainer.records) == numbers(whole)
    kept = [path.name for path in state.checkpoints(folder / "cut")]
    assert kept == ["sparse-000004", "sparse-000006"]
    lines = (folder / "cut" / LOSSES).read_text().splitlines()
    assert [json.loads(line) for line in lines] == trainer.records


def test_a_diverged_run_says_so(folder: Path) -> None:
    trainer = Trainer(settings(folder), folder / "out")
    with torch.no_grad():
        trainer.network.norm.weight.fill_(math.nan)
    with pytest.raises(DsaHalError, match="at step 1 of stage dense: the training diverged"):
        trainer.run(lambda record: None)
    assert not state.checkpoints(folder / "out")


def test_minutes_stop_with_a_checkpoint(folder: Path) -> None:
    trainer = Trainer(settings(folder), folder / "out")
    assert not trainer.run(lambda record: None, minutes=0)
    assert [p.name for p in state.checkpoints(folder / "out")] == ["dense-000000"]
    assert Trainer(settings(folder), folder / "out").run(lambda record: None)


def test_gradients_add_up_over_micro_batches(folder: Path) -> None:
    def last(out: str, micro: int) -> Tensor:
        changes = dict(warmup__steps=0, sparse__steps=0, dense__steps=3, dense__micro=micro)
        network = trained(folder, out, **changes)[0].network
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    assert (last("a", 0) - last("b", 1)).abs().max() < 1e-4


# -- what a person may get wrong -------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(lenght=3), "unknown setting 'lenght'; did you mean length?"),
        (dict(dense__stepz=3), "unknown setting 'stepz'; did you mean steps?"),
        (dict(length="long"), "length is 'long'; expected a whole number"),
        (dict(length=4096), "the model's positions allow 2 to 128"),
        (dict(dense__lr=-1.0), "lr is -1.0; expected a number of at least 0"),
        (dict(dense=3), "dense is 3; expected a group of settings"),
        (dict(dense__micro=3), "dense.batch is 2 with micro 3"),
        (dict(data__needles=2.0), "it is a share, 0 to 1"),
        (dict(betas=[0.9]), "expected two numbers"),
        (dict(betas=[0.9, 1.0]), "betas must be below 1"),
        (dict(eval_every=0), "eval_every is 0; it must be at least 1"),
        (dict(dense__lr=0.0), "dense.lr is 0 while dense.steps is 6"),
        (dict(dense__lr="1e-3"), "YAML wants a point in it"),
        (dict(focus=dict(steps=1, batch=1, lr=0.1), length=16), "windows longer than the 16 keys"),
        (dict(model__hidden_size=None), "hidden_size is None"),
    ],
)
def test_mistaken_settings(folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings(folder, **changes)
    assert words in str(error.value)


def test_missing_settings(folder: Path) -> None:
    (folder / "run.yaml").write_text("model: {}\n")
    with pytest.raises(ConfigError, match="the setting tokenizer is missing"):
        settings(folder)
    (folder / "run.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        settings(folder)


def test_runs_of_other_settings_are_refused(folder: Path) -> None:
    trained(folder, "out")
    with pytest.raises(CheckpointError, match="belongs to a run with other settings"):
        Trainer(settings(folder, seed=8), folder / "out")
    losses = folder / "out" / LOSSES
    kept = losses.read_text()
    losses.write_text(kept[:-9])
    with pytest.raises(CheckpointError, match="is damaged; delete it to go on without"):
        Trainer(settings(folder), folder / "out")
    losses.write_text(kept)
    newest = state.checkpoints(folder / "out")[-1] / "training.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="delete that folder to resume from the checkpoint"):
        Trainer(settings(folder, sparse__steps=9), folder / "out").run(lambda record: None)


def test_command_line(folder: Path, capsys: Any) -> None:
    out = folder / "out"
    asked = ["train", str(folder / "run.yaml"), "--out", str(out), "--set", "dense.steps=2"]
    assert main([*asked, "--plot", str(out / "losses.png")]) == 0
    said = capsys.readouterr().err
    assert "sparse 6/6" in said and "finished" in said
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    Transformer.from_pretrained(out / "model-bf16")
    Transformer.from_pretrained(out / "model-fp8")
    before = (out / "model-bf16" / "model.safetensors").read_bytes()
    assert main([*asked, "--set", "sparse.steps=8"]) == 0
    assert (out / "model-bf16" / "model.safetensors").read_bytes() != before, "a stale model"
    assert main([*asked, "--plot", str(folder / "none" / "losses.png")]) == 2
    assert "is no folder to write to" in capsys.readouterr().err
    assert main([*asked, "--set", "length=[1"]) == 2
    assert main(["train", str(folder / "run.yaml"), "--out", str(folder / "run.yaml")]) == 2
    assert "cannot be a run's folder" in capsys.readouterr().err
    assert main([*asked, "--set", "dense.steps"]) == 2
    assert "is no NAME=VALUE" in capsys.readouterr().err
    assert main(["train", str(folder / "none.yaml"), "--out", str(out)]) == 2
    assert "none.yaml cannot be read" in capsys.readouterr().err
