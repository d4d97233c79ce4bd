"""`dsa-hal` as its users meet it: what goes to stdout, exit codes, and one sentence per mistake."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_process import Server, environment
from random_model import CONFIG, byte_tokenizer, random_tensors
from safetensors.torch import load_file, save_file

from dsa_hal.cli import main
from dsa_hal.matrix import smallest
from dsa_hal.ops.select import to_slots
from dsa_hal.selection import use

TINY = replace(
    CONFIG, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    q_lora_rank=128, kv_lora_rank=128, index_n_heads=2, index_topk=16, n_routed_experts=4,
    n_group=2, topk_group=1, num_experts_per_tok=2, max_position_embeddings=4096,
    rope=replace(CONFIG.rope, type="default"),
)  # fmt: skip
GREEDY = ("--temperature", "0", "--max-new-tokens", "12")
ENDLESS = ("--prompt", "hello", "--max-new-tokens", "4000", "--seed", "1", "--temperature", "1")


@pytest.fixture(scope="module")
def dsa() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of two shards with an index, a tokenizer and no chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    tensors = sorted(random_tensors(TINY, 3))
    shards = {f"model-0000{at}-of-00002.safetensors": tensors[at - 1 :: 2] for at in (1, 2)}
    places = {name: file for file, part in shards.items() for name, _ in part}
    for file, part in shards.items():
        save_file(dict(part), folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(TINY.to_hf()))
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


@pytest.fixture(scope="module")
def unstoppable(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with no token that ends an answer: random weights would soon pick it."""
    folder = shutil.copytree(whole, tmp_path_factory.mktemp("unstoppable") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>"}))
    return folder


@pytest.fixture
def tiny(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to be damaged."""
    return shutil.copytree(whole, tmp_path / "tiny")


def start(*arguments: object, **env: str) -> subprocess.Popen[bytes]:
    """A process of its own, for what a fork cannot show."""
    return subprocess.Popen(
        [sys.executable, "-m", "dsa_hal", *map(str, arguments)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(**env),
    )  # fmt: skip


# -- the program -------------------------------------------------------------------------------


def test_help(dsa: Server) -> None:
    overview = dsa("--help")
    assert overview.code == 0 and overview.err == ""
    for command in ("generate", "convert", "doctor", "support", "explain", "test", "bench"):
        assert f"\n  {command} " in overview.out
        helped = dsa(command, "--help")
        assert helped.code == 0 and helped.out.startswith(f"usage: dsa-hal {command}"), helped.err
    assert dsa("--version").out.startswith("dsa-hal ")
    assert dsa().code == 2
    assert "did you mean bench" in dsa("bnech").error


# -- generate ----------------------------------------------------------------------------------


def test_text_alone_goes_to_stdout_and_a_seed_repeats_it(dsa: Server, whole: Path) -> None:
    prompt = ("generate", "--prompt", "Hello", "--max-new-tokens", "12")
    built_in = dsa(*prompt, "--explain")
    assert built_in.code == 0, built_in.err
    assert built_in.out.strip() and built_in.out.endswith("\n")
    assert "the built-in model" in built_in.err and "tokens/s" in built_in.err
    assert "mla_attention" in built_in.err and "cpu/" in built_in.err
    sampled = (*prompt, "--model", whole, "--temperature", "1", "--seed")
    first = dsa(*sampled, "7")
    assert "seed 7" in first.err
    assert dsa(*sampled, "7").out == first.out != dsa(*sampled, "8").out


def test_prompts_of_a_file_and_of_stdin(dsa: Server, whole: Path, tmp_path: Path) -> None:
    """A record per prompt, in their order, and each as if it had been asked alone."""
    prompts = ["abc defgh"[at:] + "ijkl"[:at] for at in range(10)]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts[:5]) + "\n\n" + "\n".join(prompts[5:]))
    exact = (*GREEDY, "--precision", "fp32")
    asked = ("generate", "--model", whole, *exact, "--input-file")
    records = [json.loads(line) for line in dsa(*asked, file, "--jsonl").out.splitlines()]
    assert [r["prompt"] for r in records] == prompts
    assert all(len(r["tokens"]) == 12 for r in records)
    assert dsa(*asked, "-", stdin=file.read_text()).out == "".join(
        r["text"] + "\n" for r in records
    )
    alone = dsa("generate", "--model", whole, *exact, "--prompt", prompts[9])
    assert alone.out == records[9]["text"] + "\n"


def test_text_is_streamed_and_ctrl_c_ends_it_quietly(unstoppable: Path) -> None:
    process = start("generate", "--model", unstoppable, *ENDLESS)
    assert process.stdout is not None
    assert len(process.stdout.read(5)) == 5
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_a_reader_that_leaves_ends_it_quietly(unstoppable: Path) -> None:
    process = start("generate", "--model", unstoppable, *ENDLESS)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=30) == 141
    assert b"Traceback" not in err and b"Broken" not in err


def test_a_conversation_remembers(dsa: Server, tiny: Path) -> None:
    """With a template each turn is asked behind the former ones; /new forgets; a turn too long for
    the context is refused and the conversation goes on."""
    template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (tiny / "chat_template.jinja").write_text(template)
    asked = ("generate", "--model", tiny, *GREEDY, "--interactive")
    once = dsa(*asked, stdin="hello\n")
    assert once.code == 0, once.err
    again = dsa(*asked, stdin="hello\nhello\n/new\nhello\n" + "x" * 5000 + "\nhello\n")
    assert again.code == 0, again.err
    assert again.out.startswith(once.out)
    assert again.out.count(once.out) == 2, (
        "the second turn repeats the first: it was not remembered"
    )
    assert "the conversation has" in again.err and "/new starts over" in again.err


def test_the_checkpoints_own_sampling_and_template(dsa: Server, tiny: Path) -> None:
    settings = {"do_sample": True, "temperature": 0.5, "top_p": 0.8}
    (tiny / "generation_config.json").write_text(json.dumps(settings))
    asked = ("generate", "--model", tiny, "--prompt", "hello", "--max-new-tokens", "2")
    assert "plain text, temperature 0.5, top-p 0.8, seed 0" in dsa(*asked).err
    assert "plain text, greedy" in dsa(*asked, "--temperature", "0").err
    assert "no chat template" in dsa(*asked, "--chat").error
    (tiny / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")
    assert "\nchat, " in dsa(*asked).err
    assert "\nplain text, " in dsa(*asked, "--raw").err
    (tiny / "generation_config.json").write_text('{"temperature": "hot"}')
    assert "temperature is 'hot'" in dsa(*asked).error


# -- the other commands ------------------------------------------------------------------------


def test_support(dsa: Server) -> None:
    rows = json.loads(dsa("support", "--format", "json").out)
    columns = {"target", "op", "impl", "case", "answer", "default_run", "reason"}
    assert columns == set(rows[0])
    runs = {r["case"]: r["default_run"] for r in rows if r["op"] == "topk"}
    assert runs["plain"] == "yes" and runs["prefill_128k"] == "too large"
    assert {r["answer"] for r in rows if r["op"] == "topk"} == {"served"}
    listed = list(csv.DictReader(io.StringIO(dsa("support", "topk", "--format", "csv").out)))
    assert listed == [r for r in rows if r["op"] == "topk"]
    table = dsa("support", "topk")
    assert table.code == 0 and "cpu/torch" in table.out
    assert "did you mean topk" in dsa("support", "topkk").error


def test_explain(dsa: Server) -> None:
    told = json.loads(dsa("explain", "topk", "--case", "k1", "--format", "json").out)
    assert told["serves"] == told["verdicts"][0]["impl"] and told["verdicts"][0]["question"] == "ok"
    assert "served by cpu/torch" in dsa("explain", "topk", "rows=3").out
    named = dsa("explain", "topk", DSA_HAL_IMPL="topk=reference").out
    assert "named explicitly: reference" in named
    assert "known are" in dsa("explain", "topk", "rowz=3").error
    assert "expected a whole number" in dsa("explain", "topk", "rows=-3").error
    assert "known are" in dsa("explain", "topk", "--case", "nosuch").error


def test_doctor(dsa: Server, tmp_path: Path) -> None:
    well = dsa("doctor", "--format", "json", DSA_HAL_BACKENDS="cpu")
    findings = {(f["section"], f["name"]): f for f in json.loads(well.out)}
    assert well.code == 0, well.err
    assert findings["versions", "torch"]["text"] == version("torch")
    assert findings["backends", "cpu"]["state"] == "ok"
    assert findings["self-test", "attention"]["state"] == "ok"
    assert findings["environment", "DSA_HAL_BACKENDS"]["state"] == "warning"
    ill = dsa("doctor", DSA_HAL_BACKEND="tpu")
    assert ill.code == 1 and "unknown backend 'tpu'" in ill.out and "Traceback" not in ill.err


def test_judging(dsa: Server) -> None:
    judged = json.loads(dsa("test", "topk", "to_slots", "--format", "json").out)
    assert {row["status"] for row in judged} == {"ok"} and len(judged) > 20
    table = dsa("test", "topk", "--impl", "torch", "--case", "k1")
    assert table.code == 0 and "1 ok, 0 refused, 0 failed" in table.err
    assert "known are" in dsa("test", "topk", "--impl", "nosuch").error
    assert "known are" in dsa("test", "topk", "--case", "nosuch").error


def test_bench(dsa: Server, tmp_path: Path) -> None:
    """Implementations side by side, and the line it prints asks for the same again."""
    short = ("--warmup", "0", "--repeats", "3", "--min-time", "0", "--format", "json")
    asked = ("bench", "topk", "rows=2,4", "--impl", "torch", "reference", *short)
    first = json.loads(dsa(*asked).out)
    assert [len(first["results"]), len(first["cases"])] == [4, 2]
    assert {r["impl"] for r in first["results"]} == {"cpu/torch", "reference/reference"}
    assert all(r["status"] == "ok" and r["median_s"] > 0 for r in first["results"])
    words = first["command"].split()
    assert words[0] == "dsa-hal"
    file = tmp_path / "again.json"
    assert dsa(*words[1:], "--format", "json", "--output", file).out == ""
    again = json.loads(file.read_text())
    assert again["cases"] == first["cases"] and again["command"] == first["command"]
    table = dsa("bench", "topk", "--case", "k1", *short[:-2])
    assert table.code == 0 and "again: dsa-hal bench topk --case k1" in table.out
    for wrong in (
        ("nosuch",),
        ("topk", "--case", "nosuch"),
        ("topk", "rowz=1"),
        ("topk", "--impl", "x"),
    ):
        assert "known are" in dsa("bench", *wrong).error
    assert "cannot write" in dsa("bench", "topk", "--output", tmp_path / "no" / "file").error


@pytest.fixture
def wrong() -> Iterator[None]:
    """to_slots with two implementations more: one that is off by one and one that raises."""

    def off_by_one(
        indices: torch.Tensor,
        block_table: torch.Tensor,
        rows_per_request: int = 1,
        *,
        page_size: int,
    ) -> torch.Tensor:
        return to_slots.reference(indices, block_table, rows_per_request, page_size=page_size) + 1

    def raising(
        indices: torch.Tensor,
        block_table: torch.Tensor,
        rows_per_request: int = 1,
        *,
        page_size: int,
    ) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    for fn in (off_by_one, raising):
        to_slots.impl("cpu", fn.__name__, contract=to_slots.version, rank=-9)(fn)
    with use(backend="cpu"):
        yield
    for fn in (off_by_one, raising):
        del to_slots._impls[f"cpu/{fn.__name__}"]


@pytest.mark.usefixtures("wrong")
def test_a_red_case_fails_and_prints_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "to_slots", "--format", "json"]) == 1
    told = capsys.readouterr()
    judged = {(r["impl"], r["status"]) for r in json.loads(told.out)}
    assert ("cpu/off_by_one", "failed") in judged and ("cpu/raising", "failed") in judged
    assert {status for impl, status in judged if impl == "cpu/torch"} == {"ok"}
    assert "no such kernel" in told.out and "Traceback" in told.err
    asked = [
        "bench",
        "to_slots",
        "--case",
        smallest(to_slots).name,
        "--repeats",
        "1",
        "--min-time",
        "0",
    ]
    assert main([*asked, "--impl", "off_by_one", "torch", "--format", "json"]) == 1
    red, green = json.loads(capsys.readouterr().out)["results"]
    assert red["status"] == "failed" and red["median_s"] is None and red["detail"]
    assert green["status"] == "ok" and green["median_s"] > 0
    with pytest.raises(RuntimeError, match="no such kernel"):  # a bug keeps its traceback
        main([*asked, "--impl", "raising"])


# -- every mistake: one sentence, exit code 2 --------------------------------------------------


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def shard(folder: Path, at: int = 1) -> Path:
    return folder / f"model-0000{at}-of-00002.safetensors"


def truncate(folder: Path) -> None:
    os.truncate(shard(folder), shard(folder).stat().st_size - 100)


def make_nan(folder: Path) -> None:
    tensors = load_file(shard(folder))
    tensors["model.norm.weight" if "model.norm.weight" in tensors else next(iter(tensors))].view(
        -1
    )[3] = float("nan")
    save_file(tensors, shard(folder))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such directory": (shutil.rmtree, "does not exist"),
    "a missing shard": (lambda f: shard(f, 2).unlink(), "model-00002-of-00002.safetensors"),
    "a truncated shard": (truncate, "model-00001-of-00002.safetensors"),
    "another shape": (lambda f: edit(f, hidden_size=256), "has shape"),
    "scoring function": (lambda f: edit(f, scoring_func="tanh"), "scoring_func is 'tanh'"),
    "rope type": (
        lambda f: edit(f, rope_scaling={"type": "ntk", "factor": 2}, rope_parameters=None), "'ntk'",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "non-finite weights": (make_nan, "model-00001-of-00002.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints(dsa: Server, tiny: Path, damage: str) -> None:
    ruin, words = DAMAGES[damage]
    ruin(tiny)
    assert words in dsa("generate", "--model", tiny, "--prompt", "hello", "--check-finite").error


def test_mistaken_requests_of_generate(dsa: Server, whole: Path, tmp_path: Path) -> None:
    asked = ("generate", "--model", whole, "--prompt", "hello")
    for option, value in (
        ("--max-new-tokens", "0"), ("--max-new-tokens", "many"), ("--temperature", "-1"),
        ("--temperature", "nan"), ("--top-p", "0"), ("--top-p", "1.1"), ("--seed", "-1"),
        ("--prefill-chunk", "0"), ("--precision", "int4"), ("--precision", "weight=fp8"),
    ):  # fmt: skip
        assert value.split("=")[0] in dsa(*asked, option, value).error
    assert "takes 1 to 4096" in dsa(*asked[:-1], "x" * 5000).error
    assert "takes 1 to 8" in dsa(*asked[:-1], "x" * 20, "--max-context", "8").error
    file = tmp_path / "prompts.txt"
    file.write_text("short\n" + "x" * 5000)
    assert "prompt 2 of" in dsa(*asked[:-2], "--input-file", file).error
    assert "holds no prompt" in dsa(*asked[:-2], "--input-file", "-", stdin="\n").error
    assert "cannot read" in dsa(*asked[:-2], "--input-file", tmp_path / "none").error
    assert "is required" in dsa(*asked[:-2]).error


def test_mistaken_environment(dsa: Server, whole: Path) -> None:
    """Each ends before a weight is read."""
    asked = ("generate", "--model", whole, "--prompt", "hello")
    assert "unknown backend 'tpu'" in dsa(*asked, DSA_HAL_BACKEND="tpu").error
    assert "unknown backend 'tpu'" in dsa(*asked, "--backend", "tpu").error
    assert "'nosuch'" in dsa(*asked, DSA_HAL_IMPL="rms_norm=nosuch").error
    assert "unknown op 'nosuch'" in dsa(*asked, DSA_HAL_IMPL="nosuch=torch").error
    assert "DSA_HAL_IMPL" in dsa(*asked, DSA_HAL_IMPL="topk").error
    assert "DSA_HAL_DETERMINISTIC" in dsa(*asked, DSA_HAL_DETERMINISTIC="maybe").error
    if not torch.cuda.is_available():
        assert "backend cuda was asked for, but" in dsa(*asked, DSA_HAL_BACKEND="cuda").error


# -- convert -----------------------------------------------------------------------------------


def test_convert(dsa: Server, whole: Path, tmp_path: Path) -> None:
    """What is converted says the same as its source, and a second run keeps what is there."""
    save = tmp_path / "demo"
    asked = ("convert", "--hf-ckpt-path", whole, "--n-experts", 4, "--model-parallel", 1)
    done = dsa(*asked, "--save-path", save)
    assert done.code == 0 and done.out == "", done.err
    assert "1 rank file," in done.err
    before = (save / "model0-mp1.safetensors").stat().st_mtime_ns
    assert dsa(*asked, "--save-path", save).code == 0
    assert (save / "model0-mp1.safetensors").stat().st_mtime_ns == before
    texts = [
        dsa("generate", "--model", model, "--prompt", "hello", *GREEDY).out
        for model in (whole, save)
    ]
    assert texts[0] == texts[1] != ""


def test_mistaken_conversions(dsa: Server, whole: Path, tmp_path: Path) -> None:
    """Nothing is half-written: no final file appears unless it is whole."""
    asked = ("convert", "--hf-ckpt-path", whole, "--model-parallel", 1, "--n-experts")
    save = tmp_path / "demo"
    assert "n_experts is 8" in dsa(*asked, 8, "--save-path", save).error
    assert not save.exists()
    assert (
        "does not exist"
        in dsa(*asked[:2], tmp_path / "none", *asked[3:], 4, "--save-path", save).error
    )
    file = tmp_path / "file"
    file.write_text("mine")
    assert str(file) in dsa(*asked, 4, "--save-path", file).error
    assert str(file) in dsa(*asked, 4, "--save-path", file / "below").error
    assert file.read_text() == "mine"
    full = dsa(*asked, 4, "--save-path", save, file_limit=100_000)
    assert str(save) in full.error
    assert not (save / "model0-mp1.safetensors").exists() and not (save / "config.json").exists()
    assert dsa(*asked, 4, "--save-path", save).code == 0
