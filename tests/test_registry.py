"""Selection: strict explicit choice, reasons, laziness, promises, contracts, tuning, and its
cost."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
import timeit
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_hal import env, registry, target
from dsa_hal.autotune import store
from dsa_hal.case import Cost, case
from dsa_hal.check import bitwise, each
from dsa_hal.errors import Absent, BadInput, ConfigError
from dsa_hal.ops.attention import sparse_mla
from dsa_hal.ops.quant import quantize_fp8
from dsa_hal.registry import Composite, Op
from dsa_hal.selection import OPS, Unsupported, explain, selection, use


def toy(**more: Any) -> Op[..., Any]:
    """A declared op with one plain axis: doubles a tensor."""

    def cost(x: Tensor, *, deterministic: bool = False) -> Cost:
        return Cost(x.numel(), 2 * x.numel())

    def invalid(x: Tensor, *, deterministic: bool = False) -> str | None:
        return None if x.dim() == 1 else f"x has {x.dim()} axes; expected 1"

    def requests(x: Tensor, *, deterministic: bool = False) -> frozenset[str]:
        return frozenset({"deterministic"} if deterministic else ())

    def toy_double(x: Tensor, *, deterministic: bool = False) -> Tensor:
        """x [n] -> 2x."""
        return x * 2

    facts: dict[str, Any] = dict(
        version=3,
        constant=(),
        variable={"n": "x[0]"},
        inputs=lambda make, n: {"x": make.randn(n)},
        cases=(case("one", n=1),),
        check=each(out=bitwise),
        cost=cost,
        invalid=invalid,
        requests=requests,
    )
    return Op(toy_double, **(facts | more))


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Iterator[Op[..., Any]]:
    """A toy op, declared for one test, and a selection that has not looked at anything yet."""
    before = dict(OPS)
    made = toy()
    with fresh():
        yield made
    OPS.clear()
    OPS.update(before)


def fresh() -> Any:
    return use(backend="cpu")


def register(op: Op[..., Any], name: str, refusal: str | None = None, **facts: Any) -> None:
    def why_not(x: Tensor, *, deterministic: bool = False) -> str | None:
        return refusal

    def fn(x: Tensor, *, deterministic: bool = False) -> Tensor:
        return x + x

    op.impl("cpu", name, contract=3, why_not=why_not, **facts)(fn)


def test_rank_decides_among_those_that_can(op: Op[..., Any]) -> None:
    register(op, "slow", rank=1)
    register(op, "fast", rank=9, refusal="n=1 is too small")
    assert op.select(torch.ones(1)).name == "slow"


def test_refusals_list_every_candidate_with_its_sentence(op: Op[..., Any]) -> None:
    register(op, "a", refusal="x is float32; needs float16")
    register(op, "b", needs=("no-such-package>=2",))
    register(op, "c", arch=("sm90",))
    register(op, "d", promises=())
    with use(deterministic=True), pytest.raises(Unsupported) as error:
        op(torch.ones(1))
    text = str(error.value)
    assert "toy_double on cpu:any" in text
    for sentence in (
        "cpu/a: x is float32; needs float16",
        "cpu/b: no-such-package is not installed (needs no-such-package>=2)",
        "cpu/c: made for sm90, this is any",
        "cpu/d: does not promise deterministic",
    ):
        assert sentence in text
    with use(deterministic=True):
        questions = {v.impl.name: v.question for v in explain(op, torch.ones(1))}
    assert questions == {"a": "shape", "b": "importable", "c": "device", "d": "promise"}


def test_version_ranges_of_needed_packages(op: Op[..., Any]) -> None:
    register(op, "new", needs=("torch>=999",))
    assert f"torch {version('torch')} is installed, needs torch>=999" in explain(op)[0].reason


def test_explicit_choice_is_strict(op: Op[..., Any]) -> None:
    register(op, "good", rank=5)
    register(op, "named", refusal="x is on the wrong side of bed")
    with use(toy_double="named"), pytest.raises(Unsupported, match="wrong side of bed"):
        op(torch.ones(1))
    with use(toy_double="absent"), pytest.raises(ConfigError, match="known are good, named"):
        op(torch.ones(1))
    with pytest.raises(ConfigError, match="unknown op 'toy_triple'"), use(toy_triple="named"):
        pass


def test_automatic_choice_does_not_swallow_exceptions(op: Op[..., Any]) -> None:
    register(op, "fallback", rank=0)

    def broken(x: Tensor, *, deterministic: bool = False) -> Tensor:
        raise RuntimeError("kernel launch failed")

    op.impl("cpu", "broken", contract=3, rank=9)(broken)
    with pytest.raises(RuntimeError, match="kernel launch failed"):
        op(torch.ones(1))


def test_reference_serves_only_by_name(op: Op[..., Any]) -> None:
    with pytest.raises(Unsupported, match="no implementation of it in this version"):
        op(torch.ones(2))
    with use(toy_double="reference"):
        assert op(torch.ones(2)).tolist() == [2, 2]
    with use(backend="reference"):
        assert op.select(torch.ones(2)).label == "reference/reference"


def test_a_request_that_cannot_be_kept_is_refused(op: Op[..., Any]) -> None:
    register(op, "racy", rank=9, promises=())
    register(op, "steady", rank=1)
    assert op.select(torch.ones(1)).name == "racy"
    assert op.select(torch.ones(1), deterministic=True).name == "steady"
    with use(deterministic=True):
        assert op.select(torch.ones(1)).name == "steady"


def test_invalid_arguments_are_nobodys_fault_but_the_callers(op: Op[..., Any]) -> None:
    register(op, "good")
    with pytest.raises(BadInput, match="toy_double: x has 2 axes; expected 1"):
        op(torch.ones(1, 1))


def test_contract_version_and_arguments_are_checked_at_registration(op: Op[..., Any]) -> None:
    def drifted(x: Tensor, *, stable: bool = False) -> Tensor:
        return x

    with pytest.raises(ConfigError, match="written for contract 2, this op has 3"):
        op.impl("cpu", "old", contract=2)(op.reference)
    with pytest.raises(ConfigError, match="stable"):
        op.impl("cpu", "drifted", contract=3)(drifted)
    register(op, "twice")
    with pytest.raises(ConfigError, match="registered twice"):
        register(op, "twice")


def test_an_op_is_declared_once(op: Op[..., Any]) -> None:
    with pytest.raises(ValueError, match="declared twice"):
        toy()


def test_use_nests_and_restores(op: Op[..., Any]) -> None:
    register(op, "a", rank=2)
    register(op, "b", rank=1)
    with use(toy_double="b"):
        with use(deterministic=True):
            assert op.select(torch.ones(1)).name == "b"
        with use(toy_double="a"):
            assert op.select(torch.ones(1)).name == "a"
        assert op.select(torch.ones(1)).name == "b"
    assert op.select(torch.ones(1)).name == "a"


def test_composites_come_with_their_parts(op: Op[..., Any]) -> None:
    def toy_four(x: Tensor) -> Tensor:
        """x [n] -> 4x."""
        return op(op(x))

    made = Composite(
        toy_four,
        uses=(op,),
        version=1,
        constant=(),
        variable={"n": "x[0]"},
        inputs=lambda make, n: {"x": make.randn(n)},
        cases=(case("one", n=1),),
        check=each(out=bitwise),
        cost=lambda x: Cost(2.0, 8.0),
    )
    with pytest.raises(Unsupported, match="needs toy_double, which nothing serves here"):
        made(torch.ones(1))
    with use(backend="cpu"):
        register(op, "good")
        assert made.select(torch.ones(1)).name == "composite"
        bound = made.bind(torch.ones(1, device="meta"))
    with use(toy_double="absent"):  # what is bound has chosen its parts as well
        assert bound(torch.ones(1)).tolist() == [4]
        made.impl("cpu", "fused", contract=1)(lambda x: x * 4)
    with use(backend="cpu"):
        assert made.select(torch.ones(1)).name == "fused"
    with use(backend="reference"):
        assert made(torch.ones(1)).tolist() == [4]
    assert made.reference(torch.ones(1)).tolist() == [4]


# -- devices and the environment ---------------------------------------------------------------


def test_unknown_and_absent_backends() -> None:
    with pytest.raises(ConfigError, match=r"unknown backend 'tpu'; known are auto, cpu, cuda"):
        target.detect("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(Absent, match="backend cuda was asked for, but torch"):
            target.detect("cuda")


def test_auto_passes_over_devices_without_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    every = frozenset(OPS)
    monkeypatch.setattr(target, "probe", lambda b: target.Target(b, "x", score=ord(b[0])))
    monkeypatch.setattr(target, "implements", lambda b: every if b == "cpu" else frozenset())
    assert target.detect("auto").backend == "cpu"
    monkeypatch.setattr(target, "implements", lambda b: every)
    assert target.detect("auto").backend == "rocm"


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, as a user's would be."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **environment},
        cwd=Path(__file__).parent.parent,
    )


def test_environment_is_read_and_strict() -> None:
    code = """
        import dsa_hal, torch
        try:
            print(dsa_hal.ops.quantize_fp8.select(torch.ones(1, 128)).label)
        except dsa_hal.DsaHalError as error:
            print(error)
    """
    say = {
        (): "cpu/torch",
        (("DSA_HAL_IMPL", "quantize_fp8=reference"),): "reference/reference",
        (("DSA_HAL_IMPL", "quantize_fp8=tritium"),): "no implementation 'tritium' on cpu:any",
        (("DSA_HAL_IMPL", "quantise=torch"),): "DSA_HAL_IMPL: unknown op 'quantise'",
        (("DSA_HAL_IMPL", "torch"),): "DSA_HAL_IMPL='torch': 'torch' is not of the form",
        (("DSA_HAL_BACKEND", "tpu"),): "unknown backend 'tpu'",
        (("DSA_HAL_DETERMINISTIC", "maybe"),): "DSA_HAL_DETERMINISTIC='maybe': expected 1 or 0",
    }
    children = [(want, subprocess_start(code, dict(pairs))) for pairs, want in say.items()]
    for want, child in children:
        out, err = child.communicate()
        assert want in out, out + err


def subprocess_start(code: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **environment},
        cwd=Path(__file__).parent.parent,
    )


def test_importing_is_light_and_lazy() -> None:
    """No triton, no torch_npu, no vendor library, no CUDA context, no backend file, no CLI; and
    less than 0.2 s of the processor's time on top of torch's own."""
    done = in_process("""
        import json, sys, time, torch
        before, start = set(sys.modules), time.process_time()
        import dsa_hal
        seconds = time.process_time() - start
        new = sorted(set(sys.modules) - before)
        print(json.dumps([new, torch.cuda.is_initialized(), seconds]))
    """)
    assert done.returncode == 0, done.stderr
    new, cuda, seconds = json.loads(done.stdout)
    heavy = {
        "triton", "torch_npu", "flash_mla", "deep_gemm", "flashinfer", "aiter", "transformers",
        "tokenizers", "safetensors", "rich", "yaml", "packaging",
    }  # fmt: skip
    assert not heavy & {name.partition(".")[0] for name in new}
    assert not [n for n in new if n.startswith(("torch._inductor", "dsa_hal.backends."))]
    assert not [n for n in new if n.startswith(("dsa_hal.cli", "dsa_hal.model"))]
    assert not cuda and seconds < 0.2


def test_entry_points_add_backends_and_contracts_are_refused(tmp_path: Path) -> None:
    """A package outside the tree serves an op as a backend of its own; one written for another
    contract is refused when its file is read, by name."""
    package = tmp_path / "abacus"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from dsa_hal.target import Target\n"
        "def target(): return Target('abacus', 'wood', 'cpu', 'Abacus 2', score=500)\n"
    )
    source = (
        "from dsa_hal.ops.quant import quantize_fp8\n"
        "@quantize_fp8.impl('abacus', 'beads', contract=CONTRACT)\n"
        "def quantize(x, *, group=128, block_rows=1, pow2=True):\n"
        "    return x, x\n"
    )
    info = tmp_path / "abacus-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: abacus\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[dsa_hal.backends]\nabacus = abacus\n")
    code = """
        import dsa_hal, torch
        try:
            print(dsa_hal.ops.quantize_fp8.select(torch.ones(1, 128)).label)
        except dsa_hal.DsaHalError as error:
            print(error)
    """
    for contract, want in ((1, "abacus/beads"), (99, "written for contract 99, this op has 1")):
        (package / "quantize_fp8.py").write_text(source.replace("CONTRACT", str(contract)))
        here = dict(PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
        done = in_process(code, DSA_HAL_BACKEND="abacus", **here)
        assert want in done.stdout, done.stdout + done.stderr


def test_logging_names_each_call_before_it_runs_and_costs_nothing_when_off() -> None:
    code = """
        import dsa_hal, torch
        from dsa_hal.ops.quant import quantize_fp8
        dsa_hal.ops.quantize_fp8(torch.ones(2, 128), pow2=False)
        x = torch.ones(2, 128)
        fn = quantize_fp8.bind(x)
        print(fn.__module__, hasattr(fn, "__wrapped__"))
    """
    off, on = in_process(code), in_process(code, DSA_HAL_LOG="ops")
    assert off.stderr == "" and off.stdout.split() == ["dsa_hal.backends.cpu.quantize_fp8", "False"]
    assert "quantize_fp8 cpu/torch(float32[2, 128], pow2=False)" in on.stderr


def test_the_readme_holds_the_table_of_variables() -> None:
    assert env.table() in (Path(__file__).parent.parent / "README.md").read_text()


# -- tuning ------------------------------------------------------------------------------------


@pytest.fixture
def tuned(op: Op[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Measurements of the toy op: `short` wins at 8, `long` at 4096."""
    monkeypatch.setenv("DSA_HAL_CACHE", str(tmp_path))
    register(op, "short", rank=1)
    register(op, "long", rank=2)
    rows = [
        {"call": {"x": "float32[8]"}, "us": {"short": 1.0, "long": 2.0}},
        {"call": {"x": "float32[4096]"}, "us": {"short": 9.0, "long": 8.0}},
    ]
    here = selection().target
    path = store.user_file(here)
    store.write(path, here, {"toy_double": {"contract": 3, "winners": rows}})
    return path


def test_tuning_decides_by_range(op: Op[..., Any], tuned: Path) -> None:
    with fresh():
        assert op.select(torch.ones(10)).name == "short"
        assert op.select(torch.ones(3000)).name == "long"
        bound = op.bind(torch.ones(1, device="meta"))
        assert bound(torch.ones(5)).tolist() == [2] * 5
        assert op.bind(torch.ones(1, device="meta")).__name__ == "ranged"
    with use(backend="cpu", toy_double="long"):
        assert op.select(torch.ones(10)).name == "long"
        assert op.bind(torch.ones(10)).__name__ == "fn"


def test_one_winner_everywhere_binds_to_the_bare_function(op: Op[..., Any], tuned: Path) -> None:
    tuned.write_text(tuned.read_text().replace("short: 1.0", "short: 3.0"))
    store._tables.cache_clear()
    with fresh():
        assert op.bind(torch.ones(10)) is op.select(torch.ones(10)).fn


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda text: text[: len(text) // 2] + "\n\t{", "is no tuning table"),
        (lambda text: "just words", "no stamp or ops"),
        (lambda text: text.replace("short: 1.0", "short: fast"), "expected call .* and us"),
    ],
)
def test_a_corrupt_table_is_an_error_that_names_the_file(
    op: Op[..., Any], tuned: Path, damage: Any, error: str
) -> None:
    tuned.write_text(damage(tuned.read_text()))
    store._tables.cache_clear()
    with fresh(), pytest.raises(ConfigError, match=error) as caught:
        op(torch.ones(1))
    assert str(tuned) in str(caught.value)


@pytest.mark.parametrize("was, now", [("arch: any", "arch: sm90"), ("contract: 3", "contract: 2")])
def test_tables_of_another_device_or_contract_are_passed_over(
    op: Op[..., Any], tuned: Path, was: str, now: str, caplog: pytest.LogCaptureFixture
) -> None:
    tuned.write_text(tuned.read_text().replace(was, now))
    store._tables.cache_clear()
    with fresh():
        assert op.select(torch.ones(8)).name == "long"
        assert op.select(torch.ones(8)).name == "long"
    assert len(caplog.records) == 1 and "not used" in caplog.text


# -- cost --------------------------------------------------------------------------------------


def microseconds(fn: Any, *args: Any) -> float:
    """Best of many short loops, in this process's own time: other work on the machine is not
    ours."""
    loops = timeit.repeat(lambda: fn(*args), time.process_time, number=500, repeat=80)
    return min(loops) / 500 * 1e6


def fits(limit: float, cost: Any) -> bool:
    """Whether a cost in microseconds is within its limit, on an idle machine. This one may be busy:
    the limit grows with the time of adding two numbers by torch, 1.4 us where it was set, and one
    quiet moment out of ten is enough."""
    one = torch.ones(1)
    return any(cost() < limit * max(1.0, microseconds(one.add, one) / 1.4) for _ in range(10))


def test_a_called_op_costs_little_and_a_bound_one_nothing(op: Op[..., Any]) -> None:
    """What a call adds, by an op whose implementation does nothing and by the selection of a real
    one; a bound op is the bare function."""
    op.impl("cpu", "nothing", contract=3)(lambda x, *, deterministic=False: x)
    x = torch.ones(8)
    bare = op.bind(x)
    assert fits(2.0, lambda: microseconds(op, x) - microseconds(bare, x))
    q, kv, indices = torch.ones(1, 8, 40), torch.ones(9, 40), torch.zeros(1, 1, dtype=torch.int32)

    def attend() -> Any:
        return sparse_mla.select(q, kv, indices, softmax_scale=0.1, dim_v=32)

    impl = attend()
    assert sparse_mla.bind(q, kv, indices, softmax_scale=0.1, dim_v=32) is impl.fn
    assert fits(2.0, lambda: microseconds(attend))
    x = torch.ones(1, 128)
    assert fits(2.0, lambda: microseconds(quantize_fp8.select, x))


def test_answers_are_remembered_by_shapes_dtypes_and_plain_arguments(op: Op[..., Any]) -> None:
    asked = []

    def why_not(x: Tensor, *, deterministic: bool = False) -> str | None:
        asked.append(x.shape[0])
        return "n=3 is odd" if x.shape[0] == 3 else None

    op.impl("cpu", "even", contract=3, why_not=why_not)(op.reference)
    for n in (2, 2, 4, 2):
        op.select(torch.ones(n))
    assert asked == [2, 4]
    op.select(torch.ones(2, dtype=torch.float64))
    op.select(torch.ones(2), deterministic=True)
    assert asked == [2, 4, 2, 2]
    for _ in range(2):
        with pytest.raises(Unsupported, match="n=3 is odd"):
            op.select(torch.ones(3))


def test_a_range_lookup_costs_about_a_microsecond(op: Op[..., Any], tuned: Path) -> None:
    with fresh():
        x = torch.ones(8)
        ranged, bare = op.bind(x), op.select(x).fn
        assert fits(1.5, lambda: microseconds(ranged, x) - microseconds(bare, x))


def test_registry_refuses_ops_with_drifting_companions() -> None:
    with pytest.raises(ConfigError, match="arguments"):
        toy(cost=lambda y: Cost(1, 1))
    assert "toy_double" not in OPS and registry.OPS is OPS
