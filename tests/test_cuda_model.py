"""The model's part in running on accelerators: steps of fixed size, recording, layers without a
checkpoint, and what their times are made of. All of it here on the processor."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foreign import foreign
from random_model import CONFIG, random_checkpoint

from dsa_hal import cli, graphs
from dsa_hal.cli.cost import Unit, points, table
from dsa_hal.cli.layers import Layer, Measured, Work, works
from dsa_hal.cli.suites.layer import tables
from dsa_hal.errors import DsaHalError
from dsa_hal.matrix import Row, attempt
from dsa_hal.model.checkpoint import Checkpoint
from dsa_hal.model.decoder import Decoder, FixedBatch
from dsa_hal.model.quality.selectors import selecting
from dsa_hal.model.synthetic import RandomWeights
from dsa_hal.model.transformer import Transformer
from dsa_hal.ops.absorbed import mla_attention
from dsa_hal.ops.moe import moe_experts, permute
from dsa_hal.ops.routing import route
from dsa_hal.selection import use

CPU = torch.device("cpu")
SMALL = replace(CONFIG, num_hidden_layers=2, n_routed_experts=8, hidden_size=256, index_topk=64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Transformer:
    return Transformer.from_pretrained(checkpoint, precision="fp32")


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(2, 250, (n,), generator=generator) for n in lengths]


# -- steps of fixed size -------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [6, 300])
def test_fixed_steps_compute_what_growing_ones_do(model: Transformer, extra: int) -> None:
    """With room below and beyond index_topk: both decide by room what is scored. A request that
    rests changes nothing for the others."""
    given, fed = prompts(9, 130, 70), torch.randint(2, 250, (5, 3))
    room = [len(p) + extra for p in given]

    def prefilled() -> tuple[Any, Any]:
        cache, contexts = model.new_cache(room)
        for _ in model.prefill(cache, contexts, given):
            pass
        return cache, contexts

    cache, contexts = prefilled()
    wanted = [model.decode(cache, contexts, row[:, None])[:, 0] for row in fed]
    cache, contexts = prefilled()
    batch = FixedBatch(model, cache, contexts, room, record=False)
    for at, (row, want) in enumerate(zip(fed.tolist(), wanted, strict=True)):
        if at == 3:
            batch.rest(1)
        logits = batch(row)
        others = [0, 2] if at >= 3 else [0, 1, 2]
        torch.testing.assert_close(logits[others], want[others], atol=2e-4, rtol=2e-4)
    assert [c.length for c in contexts] == [9 + 5, 130 + 3, 70 + 5]


def test_recorded_batches_shrink(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is made anew when half of it rests; every logit goes to the row that asked."""
    made: list[int] = []
    plain = FixedBatch.__init__

    def watched(self: FixedBatch, *args: Any, record: bool) -> None:
        made.append(len(args[2]))
        plain(self, *args, record=False)

    monkeypatch.setattr(FixedBatch, "__init__", watched)
    given = prompts(20, 30, 40, 50)
    room = [len(p) + 8 for p in given]
    cache, contexts = model.new_cache(room)
    for _ in model.prefill(cache, contexts, given):
        pass
    decode = Decoder(model, cache, contexts, room)
    decode._record = True
    fed = [{0: 5, 1: 6, 2: 7, 3: 8}, {0: 9, 2: 10, 3: 11}, {2: 12, 3: 13}, {3: 14}]
    got = [decode(tokens) for tokens in fed]
    assert made == [4, 2, 1]
    history = [*given[3].tolist(), 8, 11, 13, 14]
    want = model(torch.tensor([history]))[0]
    for logits, at in zip(got, range(-4, 0), strict=True):
        torch.testing.assert_close(logits[-1], want[at], atol=2e-4, rtol=2e-4)


def test_other_selectors_are_not_recorded(model: Transformer) -> None:
    """Random keys are drawn with a look at the data, which a recording cannot have."""
    with selecting(model, "dsa"):
        assert model.record
    with selecting(model, "random"):
        assert not model.record
    assert model.record


# -- recording -----------------------------------------------------------------------------------


def test_a_processor_records_nothing() -> None:
    assert not graphs.can_record(CPU)
    with pytest.raises(DsaHalError, match="cpu records no work"):
        graphs.Recorded(lambda: 1, CPU)


def fake_device(replays: list[str]) -> SimpleNamespace:
    @contextmanager
    def graph(made: Any) -> Iterator[None]:
        yield

    return SimpleNamespace(
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: replays.append("replay")), graph=graph
    )


def test_recorded_work_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    replays: list[str] = []
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake_device(replays))
    device = torch.device("cuda")
    assert graphs.can_record(device)
    recorded = graphs.Recorded(lambda: "result", device)
    assert not replays and recorded.replay() == "result" and replays == ["replay"]

    def waits() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(DsaHalError, match=r"not permitted when stream is capturing\); an op"):
        graphs.Recorded(waits, device)


# -- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("work", [Work("prefill", 32, 96), Work("decode", 3, 96)], ids=str)
def test_dense_attention_is_sparse_attention_that_selects_everything(work: Work) -> None:
    """Same weights, same cached latents: unquantised ones, so that both cache the same."""
    source = RandomWeights(replace(SMALL, index_topk=128, quant=None), CPU)
    layer = Layer(source, 1, CPU, tokens=3 * 128, precision="fp32")
    for name in ("q_norm", "kv_norm", "kv_b", "expand", "out"):
        setattr(layer._dense, name, getattr(layer._own, name))
    q_a, _, kv_a = (
        layer._own.down._parts[0][0]
        .weight[0]
        .split(
            [SMALL.q_lora_rank, SMALL.index_head_dim, SMALL.kv_lora_rank + SMALL.qk_rope_head_dim]
        )
    )
    layer._dense.down._parts[0][0].weight[0].copy_(torch.cat([q_a, kv_a]))
    q_b = layer._own.up._parts[0][0].weight[0][: SMALL.num_attention_heads * SMALL.qk_head_dim]
    layer._dense.up._parts[0][0].weight[0].copy_(q_b)
    with torch.inference_mode():
        own, dense = (layer._prepared(kind, work)() for kind in ("dsa", "dense"))
    torch.testing.assert_close(own, dense, atol=2e-4, rtol=2e-4)


def test_random_weights_are_those_a_checkpoint_would_have(checkpoint: Path) -> None:
    made = RandomWeights(CONFIG, CPU)
    with Checkpoint.open(checkpoint) as stored:
        at = "model.layers.1.self_attn."
        for name in (at + "q_a_proj", at + "kv_a_proj_with_mqa", at + "o_proj"):
            (weight, scale), (like, like_scale) = made.linear(name), stored.linear(name)
            assert scale is not None and like_scale is not None
            assert (weight.shape, weight.dtype) == (like.shape, like.dtype)
            assert (scale.shape, scale.dtype) == (like_scale.shape, like_scale.dtype)
            assert weight.float().isfinite().all()
            deviation = float((weight.float() * scale[0, 0]).std()) * weight.shape[1] ** 0.5
            assert deviation == pytest.approx(1, rel=0.1)
        for part in ("gate_up", "down"):
            pairs = zip(made.expert_stack(1, part), stored.expert_stack(1, part), strict=True)
            assert all(a[0].shape == b[0].shape and a[1].shape == b[1].shape for a, b in pairs)
        for name in (at + "q_a_layernorm.weight", "model.layers.1.mlp.gate.weight"):
            assert made.tensor(name).shape == stored.tensor(name).shape


def test_a_layer_is_timed_part_by_part() -> None:
    layer = Layer(RandomWeights(SMALL, CPU), 1, CPU, tokens=512)
    scored = layer.measure("dsa", Work("decode", 2, 200), 2)
    dense = layer.measure("dense", Work("decode", 2, 200), 2)
    prefill = layer.measure("dsa", Work("prefill", 16, 200), 2)
    assert {"indexer_topk_paged", "to_slots", "mla_attention", "moe_experts"} <= scored.ops.keys()
    assert "dense_mla" in dense.ops and not {"indexer_qk", "mla_attention"} & dense.ops.keys()
    assert "indexer_topk" in prefill.ops
    for m in (scored, dense, prefill):
        assert 0 < m.attend < m.attention < m.stamped and not m.recorded
        assert m.attention + m.feed_forward < 1.5 * m.stamped
        assert sum(m.ops.values()) < 1.5 * m.stamped


def test_works_skip_prompts_longer_than_their_context() -> None:
    made = works((8, 64), prefill=(16,), decode=(1, 4))
    assert [str(w) for w in made] == [
        "prefill 16 of 64", "decode 1 x 8", "decode 1 x 64", "decode 4 x 8", "decode 4 x 64",
    ]  # fmt: skip


# -- what is told --------------------------------------------------------------------------------


def measured(kind: Any, work: Work, whole: float) -> Measured:
    ops = {"dense_mla" if kind == "dense" else "mla_attention": whole / 2}
    return Measured(kind, work, whole, whole / 2, whole * 0.6, whole * 0.3, ops, whole, True)


SIDES = [
    measured(kind, work, seconds)
    for work, own, other in (
        (Work("prefill", 4, 8), 4e-3, 2e-3), (Work("decode", 2, 8), 1e-3, 6e-3)
    )
    for kind, seconds in (("dsa", own), ("dense", other))
]  # fmt: skip


def test_costs_are_per_token() -> None:
    prefill, decode = points(SIDES)
    assert (prefill.dsa, prefill.dense) == (1e-3, 0.5e-3)
    assert (decode.dsa, decode.dense, decode.dense_attend) == (0.5e-3, 3e-3, 1.5e-3)
    text = table([prefill, decode], Unit("microseconds", 1e6))
    assert "0.50x" in text and "6.00x" in text and "3,000" in text


def test_the_suite_tells_both_sides_and_each_op() -> None:
    text = tables("A heading", SIDES)
    assert text.startswith("A heading\n") and "6.00x" in text
    assert "decode, without: each op" in text and "dense_mla" in text
    assert "launched by the host" not in text
    assert "decode 2 x 8 (dsa)" in tables("", [replace(m, recorded=False) for m in SIDES])


def test_pictures_are_drawn() -> None:
    pytest.importorskip("matplotlib")
    from dsa_hal.cli.cost_picture import cost
    from dsa_hal.cli.suites._layer_picture import layer

    assert layer("A heading", SIDES).startswith(b"\x89PNG")
    assert cost("A heading", points(SIDES), Unit("us", 1e6)).startswith(b"\x89PNG")


def test_the_cost_command(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    record = tmp_path / "cost.json"
    command = ["report", "cost", "--model", str(checkpoint), "--backend", "cpu", "--positions",
               "128,384", "--prefill", "16", "--decode", "2", "--json", str(record)]  # fmt: skip
    assert cli.main(command) == 0
    told, found = capsys.readouterr().out, json.loads(record.read_text())
    assert "microseconds per token and layer" in told
    assert [(p["phase"], p["position"]) for p in found["points"]] == [
        ("prefill", 128), ("prefill", 384), ("decode", 128), ("decode", 384),
    ]  # fmt: skip
    # both are timed, each on its own: on a busy machine a part can take longer than the whole
    assert all(min(p["dsa"], p["dsa_attend"]) > 0 for p in found["points"])
    assert len(found["results"]) == 8 and found["served"]["mla_attention"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["report", "cost", "--published", "--model", "x"], "leave --model out"),
        (["report", "cost", "--layer", "99"], "there is no layer 99; this model has 4"),
        (["report", "cost", "--positions", "9999999"], "position 9999999 lies beyond"),
        (["report", "cost", "--backend", "cpu", "cuda"], "name one backend"),
        (["bench", "--suite", "layer", "--backend", "cpu"], "needs an accelerator"),
        (["bench", "topk", "--suite", "layer"], "leave the op out"),
    ],
)
def test_wrong_requests_get_a_sentence(words: list[str], sentence: str, capsys: Any) -> None:
    assert cli.main(words) == 2
    assert sentence in capsys.readouterr().err


# -- kernels -------------------------------------------------------------------------------------


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_refusals_say_what_was_asked() -> None:
    from dsa_hal.backends.cuda import moe_experts as _experts
    from dsa_hal.backends.cuda import permute as _permute
    from dsa_hal.backends.cuda import route as _route

    ids = meta(2, 2, dtype=torch.int32)
    assert _route._why_not(meta(2, 256), topk=8) is None
    assert "5000 experts" in (_route._why_not(meta(2, 5000), topk=8) or "")
    assert _permute._why_not(meta(2, 8), ids, experts=256) is None
    assert "5000 experts" in (_permute._why_not(meta(2, 8), ids, experts=5000) or "")
    fp8 = [meta(4, 256, 128, dtype=torch.float8_e4m3fn), meta(4, 2, 1)]
    x = meta(2, 128, dtype=torch.bfloat16)
    assert _experts._why_not(x, ids, meta(2, 2), fp8, fp8, act="fp8") is None
    assert "act is none" in (_experts._why_not(x, ids, meta(2, 2), fp8, fp8) or "")
    half = _experts._why_not(x.half(), ids, meta(2, 2), fp8, fp8, act="fp8")
    assert half is not None and "torch.float16" in half
    assert {"cuda/triton"} <= route._impls.keys() & permute._impls.keys()
    assert "cuda/fused" in moe_experts._impls


def test_absorbed_attention_written_in_place_is_the_op() -> None:
    """Plain torch, so that the matrix can judge it here. Pools that the kernels behind it do not
    know are refused."""
    import_module("dsa_hal.backends.cuda.mla_attention")
    impl = mla_attention._impls["cuda/torch"]
    with use(backend="cpu"):
        small = [case for case in mla_attention.cases if not case.model]
        outcomes = {case.name: attempt(Row(mla_attention, impl, case)) for case in small}
    assert outcomes.pop("fp32_weight").detail.endswith("takes both of one dtype")
    unknown = {case.name for case in small if foreign(case)}
    assert {name: o.status for name, o in outcomes.items()} == {
        name: "refused" if name in unknown else "ok" for name in outcomes
    }
    assert {"pages", "rows", "no_key"} <= outcomes.keys()


INTERPRETED = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import sys
import dsa_hal.backends.cuda.permute, dsa_hal.backends.cuda.route, dsa_hal.backends.cuda.unpermute
from dsa_hal.backends.portable._kernels import moe
from dsa_hal.matrix import Row, attempt
from dsa_hal.selection import OPS, use
with use(backend="cpu"):
    for few in (moe.FEW, 0):
        moe.FEW = few
        for name, cases in (
            ("route", ("one", "singles", "everyone")),
            ("permute", ("one", "empty_aligned", "all_absent")),
            ("unpermute", ("one", "all_absent")),
        ):
            op = OPS[name]
            for case in op.cases:
                if case.name in cases:
                    outcome = attempt(Row(op, op._impls["cuda/triton"], case))
                    print(name, case.name, few, outcome.status, outcome.detail, outcome.trace)
"""


def test_kernels_agree_with_the_reference_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 16, done.stderr
    assert all(" ok " in line for line in lines), done.stdout
