"""What of the CUDA selection and of its compiler can be asked without a GPU: plans, the cache of
machine code, the packing of parameters."""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa_hal.backends.cuda import _nvrtc, _sift, indexer_topk, indexer_topk_paged, to_slots, topk
from dsa_hal.errors import Absent
from dsa_hal.ops.select import MAX_K

SHARED = 227 << 10
"""Bytes of shared memory that a block may have on Hopper."""


@pytest.mark.parametrize("rows", [1, 2, 64, 133, 4096])
@pytest.mark.parametrize("n", [1, 4096, 32768, 131072, 1 << 20])
@pytest.mark.parametrize("k", [1, 2048, 2049, MAX_K])
def test_every_plan_fits_a_processor(rows: int, n: int, k: int) -> None:
    """As many blocks as are meant to be resident, and what the kernel takes for granted of the
    list's length: a tile fits beside k entries, and k beside k."""
    configs = topk.legal(rows=rows, n=n, k=k, processors=132)
    assert len(set(configs)) == len(configs)
    for config in configs:
        assert config.cluster in (1, 2, 4, 8) and config.threads % 32 == 0
        cap = config.capacity(k)
        assert cap >= k + config.threads * config.per and cap >= 2 * k
        assert cap % (4 * config.threads) == 0
        assert config.resident * (config.shared(k) + 1024) <= SHARED + 1024


def test_few_long_rows_are_shared_and_many_are_not() -> None:
    def pick(rows: int, n: int) -> topk.Config:
        return topk.SPACE.pick(rows=rows, n=n, k=2048, processors=132)

    assert pick(1, 131072).cluster == 8
    assert pick(1, 4096).cluster == 1
    assert pick(4096, 131072).cluster == 1


def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Launches are recorded instead of made."""
    made: list[dict[str, Any]] = []

    class Recorder:
        def launch(self, name: str, grid: Any, block: Any, args: Any, **more: Any) -> None:
            made.append(dict(name=name, grid=grid, block=block, args=args, **more))

    monkeypatch.setattr(_nvrtc, "module", lambda source, defines=(): Recorder())
    monkeypatch.setattr(topk, "processors", lambda device: 132)
    return made


def test_a_selection_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = launches(monkeypatch)
    ends = torch.ones(6, dtype=torch.int32)[::2]
    logits = torch.zeros(3, 80000, dtype=torch.bfloat16)[:, 8:]
    out = topk.select(logits, 7, None, ends)
    assert list(out.shape) == [3, 7] and out.dtype == torch.int32
    (launch,) = made
    assert launch["name"] == "topk_bf16" and launch["grid"] == (24,) and launch["cluster"] == (8,)
    assert launch["args"][0] is logits and launch["args"][1] == 0
    assert launch["args"][2].stride(0) == 1, "a strided bound is copied"
    assert launch["args"][4:8] == (80000, 79992, 7, 0)
    assert topk.select(logits[:0], 7).shape == (0, 7) and len(made) == 1, "no rows, no launch"


def test_page_sizes_that_are_no_power_of_two_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    made = launches(monkeypatch)
    indices, table = torch.zeros(4, 2049, dtype=torch.int32), torch.ones(2, 5, dtype=torch.int32)
    for page_size, shift in ((64, 6), (1, 0), (3, -1)):
        to_slots.slots(indices, table, 2, page_size=page_size)
        assert made[-1]["args"][-3:] == (page_size, shift, 5) and made[-1]["grid"] == (4, 3)
    none = to_slots.slots(indices, table[:, :0], 2, page_size=64)
    assert bool((none == -1).all()) and len(made) == 3


# -- scores in chunks ---------------------------------------------------------------------------


def chunked(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[tuple[list[int], int]]:
    """Shapes of the scores asked for and their row stride; a row's selection is its first bound."""
    asked: list[tuple[list[int], int]] = []

    def scores_into(*args: Any, clean: bool, **_: Any) -> None:
        out = next(a for a in reversed(args) if a.dim() == 2 and a.dtype == torch.float32)
        asked.append((list(out.shape), out.stride(0)))
        out.fill_(torch.nan)

    def run(scores: Any, k: int, starts: Any, ends: Any, out: Any, *, overlap: bool) -> None:
        assert scores.shape[0] == ends.shape[0] == out.shape[0]
        out.copy_(ends[:, None].expand(-1, k))

    monkeypatch.setattr(module, "scores_into", scores_into)
    monkeypatch.setattr(module, "run", run)
    return asked


@pytest.mark.parametrize(("context", "step"), [(8191, 32), (300001, 1), (100, 70)])
def test_a_chunk_stays_within_its_budget(
    monkeypatch: pytest.MonkeyPatch, context: int, step: int
) -> None:
    """Every token once, in order; no more than 1 MiB of scores, or one row."""
    asked = chunked(monkeypatch, indexer_topk)
    rows = torch.arange(70, dtype=torch.int32)
    q, k = torch.zeros(70, 1, 1), torch.zeros(context, 1)
    out = indexer_topk.select(q, k, k[:, 0], q[:, 0], rows, rows, 3, logits_mb=1)
    assert torch.equal(out, rows[:, None].expand(-1, 3))
    assert [shape[0] for shape, _ in asked] == [min(step, 70 - at) for at in range(0, 70, step)]
    assert all(shape[1] == context and stride % 4 == 0 for shape, stride in asked)


def test_requests_are_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = chunked(monkeypatch, indexer_topk_paged)
    lens = torch.arange(10, dtype=torch.int32).view(5, 2)
    out = indexer_topk_paged.select(
        torch.zeros(5, 2, 1, 1), torch.zeros(1, 1, 1), torch.zeros(10, 1), lens,
        torch.zeros(5, 1, dtype=torch.int32), 4, layout="any", max_context_len=60000, logits_mb=1,
    )  # fmt: skip
    assert torch.equal(out, lens.view(-1, 1).expand(-1, 4))
    assert [shape for shape, _ in asked] == [[4, 60000], [4, 60000], [2, 60000]]


# -- scores that are sifted -----------------------------------------------------------------------


def test_a_plan_stays_within_its_budget_and_fills_the_processors() -> None:
    for tokens, context, heads, k, budget in (
        (4096, 32768, 64, 2048, 64), (16384, 65536, 64, 2048, 64), (2048, 131072, 64, 2048, 64),
        (8192, 20000, 32, 100, 32),
    ):  # fmt: skip
        plan = _sift.plan(tokens, context, heads, k, budget)
        assert plan is not None and plan.sample % 64 == 0
        assert plan.whole % 16 == plan.rows % 16 == 0, "parts begin at blocks of queries"
        assert 4 * plan.floats() <= budget << 20
        assert plan.rows * heads // 512 >= 127, "a thread block may not share more than two blocks"
        assert plan.sample < plan.entries * 64 * 2 and plan.sample * 15 <= context
        assert k < plan.entries * 64, "the lists hold what is selected"
    sizes = ((4096, 8192, 2048, 64), (512, 32768, 2048, 64), (4096, 32768, 2048, 1))
    for tokens, context, k, budget in (*sizes, (4096, 32768, 4096, 64), (4096, 1 << 20, 2048, 64)):
        assert _sift.plan(tokens, context, 64, k, budget) is None


def test_the_sample_is_what_the_kernels_take_for_it() -> None:
    """The host makes room for as many columns as the kernel counts."""
    text = (_nvrtc.KERNELS / "indexer_guess.cuh").read_text()
    assert f"EVERY = {_sift.EVERY}, DRAWN = {_sift.DRAWN};" in text
    for context in (16384, 16385, 16896, 16897, 131072):
        plan = _sift.plan(4096, context, 64, 2048, 64)
        tiles = range(-(-context // 64))
        drawn = sum(tile % _sift.EVERY == _sift.DRAWN for tile in tiles)
        assert plan is not None and plan.sample == 64 * drawn


def test_sifted_scores_are_selected_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample and floors of many rows, then of fewer at a time the other scores and a cut; then
    what may have to be done again, all rows of it. All but the first, which may follow what is no
    kernel, wait for the one before by themselves."""
    made = launches(monkeypatch)
    parts: list[tuple[int, int]] = []

    def launch(*args: Any, part: int = 0, overlap: bool, **more: Any) -> None:
        parts.append((part, args[0].shape[0]))
        made.append(dict(name="scores", part=part, overlap=overlap, out=args[6], **more))

    monkeypatch.setattr(_sift, "launch", launch)
    q, keys = torch.zeros(2500, 64, 4), torch.zeros(20000, 4)
    bounds = torch.zeros(2500, 2, dtype=torch.int32)[:, 0]
    out = torch.zeros(2500, 500, dtype=torch.int32)
    plan = _sift.Plan(whole=2000, rows=1008, entries=40, sample=1216)
    _sift.select(q, keys, keys[:, 0], q[..., 0], bounds, bounds, out, plan, 64)
    first, cut = ["scores", "guess"], ["scores", "best"]
    again = made[10:]
    assert [step["name"] for step in made[:10]] == first + cut + cut + first + cut
    assert parts[:5] == [(1, 2000), (2, 1008), (2, 992), (1, 500), (2, 500)]
    assert [step["args"][8] for step in made if step["name"] == "best"] == [0, 1008, 2000]
    assert [step["overlap"] for step in made] == [False] + [True] * (len(made) - 1)
    assert {step["name"] for step in again} == {"scores", "topk_fp32"}
    rows = sum(step["out"].shape[0] for step in again if step["name"] == "scores")
    assert rows >= 2500 and all(step["out"].nbytes <= 64 << 20 for step in made if "out" in step)
    assert [step["at"] for step in again if "at" in step] == [
        step["args"][8] for step in again if "args" in step
    ], "what is scored again is what is selected again"


# -- the compiler ---------------------------------------------------------------------------------


class Compiler:
    """NVRTC's binding as `compiled` uses it: counts its programs, refuses sources with `bad`."""

    def __init__(self) -> None:
        self.text, self.runs = b"", 0

    def nvrtcCreateProgram(self, text: bytes, name: bytes, *_: Any) -> tuple[int, int]:
        self.text = text
        return 0, 1

    def nvrtcCompileProgram(self, program: int, count: int, options: list[bytes]) -> tuple[int]:
        self.runs += 1
        assert count == len(options) and b"--gpu-architecture=sm_90a" in options
        return (int(b"bad" in self.text),)

    def nvrtcGetProgramLogSize(self, program: int) -> tuple[int, int]:
        return 0, 12

    def nvrtcGetProgramLog(self, program: int, log: bytes) -> tuple[int]:
        ctypes.memmove(log, b"line 1: bad\0", 12)
        return (0,)

    def nvrtcGetCUBINSize(self, program: int) -> tuple[int, int]:
        return 0, 4

    def nvrtcGetCUBIN(self, program: int, code: bytes) -> tuple[int]:
        ctypes.memmove(code, b"code", 4)
        return (0,)

    def nvrtcDestroyProgram(self, program: int) -> tuple[int]:
        return (0,)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    """A compiler of its own, with sources and cache in an empty folder."""
    made = Compiler()
    monkeypatch.setattr(_nvrtc, "_compiler", lambda: (made, 13, 0))
    monkeypatch.setattr(_nvrtc, "KERNELS", tmp_path)
    monkeypatch.setenv("DSA_HAL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.cu").write_text('#include "b.cuh"\nkernel')
    (tmp_path / "b.cuh").write_text("helper")
    return made


def test_machine_code_is_kept(compiler: Compiler, tmp_path: Path) -> None:
    """Compiled once for the same text, and again for another macro, target or included file."""

    def code(defines: tuple[tuple[str, int], ...] = (), arch: str = "sm_90a") -> bytes:
        return _nvrtc.compiled("a.cu", defines, arch)

    assert code() == code() == b"code" and compiler.runs == 1
    code((("K", 1),))
    (tmp_path / "b.cuh").write_text("another helper")
    code()
    assert compiler.runs == 3
    kept = sorted((tmp_path / "cache" / "nvrtc").iterdir())
    assert len(kept) == 3 and {path.suffix for path in kept} == {".cubin"}


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:10], lambda d: b"\xff" * len(d)])
def test_a_damaged_entry_is_compiled_anew(
    compiler: Compiler, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    _nvrtc.compiled("a.cu", (), "sm_90a")
    (entry,) = (tmp_path / "cache" / "nvrtc").iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    assert _nvrtc.compiled("a.cu", (), "sm_90a") == b"code" and compiler.runs == 2
    assert entry.read_bytes()[64:] == b"code"


def test_a_refused_source_shows_the_log(compiler: Compiler, tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text("bad")
    with pytest.raises(RuntimeError, match=r"NVRTC 13\.0 refused a\.cu for sm_90a:\nline 1: bad$"):
        _nvrtc.compiled("a.cu", (), "sm_90a")
    assert not (tmp_path / "cache").exists()


def test_a_machine_without_a_device_is_told() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert "finds no CUDA device" in str(_nvrtc.available())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda", None)
    _nvrtc._compiler.cache_clear()
    with pytest.raises(Absent, match="pip install cuda-bindings"):
        _nvrtc._compiler()


# -- parameters and tensor maps -----------------------------------------------------------------


def test_parameters_lie_where_the_kernel_reads_them() -> None:
    layout = [(0, 8), (8, 4), (12, 4), (16, 8), (64, 128)]
    frame = _nvrtc.Frame("kernel", layout)
    address = frame.fill((1 << 50, -5, 0.5, 1 << 40, b"m" * 128))
    pointers = (ctypes.c_void_p * 5).from_address(address)
    base = pointers[0]
    assert base is not None and [p - base for p in pointers if p is not None] == [0, 8, 12, 16, 64]
    packed = frame.memory.raw
    assert struct.unpack_from("<Qifq", packed) == (1 << 50, -5, 0.5, 1 << 40)
    assert packed[64:192] == b"m" * 128


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((1,), "takes 2 parameters, not 1"),
        ((torch.zeros(1), 1), "a tensor on cpu for a parameter of 4 bytes"),
        ((1, b"12345678"), "8 bytes for a parameter of 128"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(args: tuple[Any, ...], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        _nvrtc.Frame("kernel", [(0, 4), (64, 128)]).fill(args)


@pytest.mark.parametrize("t", [torch.zeros(4, 6)[:, ::2], torch.zeros(4, 6), torch.zeros(65)[1:]])
def test_tensors_that_cannot_be_tiled_are_named(t: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=re.escape(f"shape {list(t.shape)}")):
        _nvrtc.tensor_map(t, (1,) * t.dim())
