"""What decides where decoding's work is done, on any machine: splits, tiles, predicates."""

import itertools
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa_hal.backends.cuda import sparse_mla_paged as hopper
from dsa_hal.backends.portable.sparse_paged import SPACE, factors, splits_of
from dsa_hal.ops.attention import sparse_mla_paged
from dsa_hal.ops.layout import KVLayout


@pytest.mark.parametrize("processors", [1, 78, 132])
@pytest.mark.parametrize("work", [1, 2, 16, 100, 128, 256, 512, 70000])
@pytest.mark.parametrize("blocks", [1, 2, 3, 31, 32, 33, 512])
def test_splits_leave_no_piece_without_a_block(work: int, blocks: int, processors: int) -> None:
    splits = splits_of(work, blocks, processors, blocks)
    span = -(-blocks // splits)
    assert 1 <= splits <= blocks
    assert (splits - 1) * span < blocks <= splits * span


def test_splits_fill_the_processors_and_spare_the_join() -> None:
    assert splits_of(2, 32, 132, 32) >= 16  # one query of 128 heads
    assert splits_of(32, 32, 132, 32) == 4
    for work in (128, 256, 70000):  # waves that are full as they are
        assert splits_of(work, 32, 132, 32) == 1


def test_equal_parts_cover_every_block_and_have_a_place() -> None:
    found = 0
    for workers, blocks, rows in itertools.product(
        (1, 66, 132), (2, 3, 7, 31, 32, 100), (67, 80, 100, 150, 200, 300)
    ):
        parts = hopper.even(rows, 16, blocks, workers)
        if parts is None:
            continue
        span, places = parts
        found += 1
        assert places > 1 and workers * span >= rows * blocks
        for row in range(rows):  # the workers that a row's blocks fall to, as the kernel counts
            pieces = ((row + 1) * blocks - 1) // span - row * blocks // span + 1
            assert 1 <= pieces <= places, (rows, blocks, workers)
    assert found > 20


def test_equal_parts_only_where_rows_leave_processors_idle() -> None:
    assert hopper.even(100, 128, 32, 66) == (49, 2)  # 66 rows, then 34
    assert hopper.even(150, 64, 32, 132) == (37, 2)
    for rows in (64, 66, 128, 132, 70000):  # waves that are full, or nearly
        assert hopper.even(rows, 128, 32, 66) is None, rows
    assert hopper.even(100, 128, 0, 66) is None and hopper.even(100, 128, 32, 0) is None
    for rows in (70, 100, 10000, 70000):  # of one block each: nothing to cut, nothing to join
        assert hopper.even(rows, 1, 1, 66) is None


@pytest.mark.parametrize("heads", [1, 8, 16, 17, 64, 96, 128])
@pytest.mark.parametrize("width", [16, 256, 512])
@pytest.mark.parametrize("bytes", [2, 4])
def test_tiles_are_powers_of_two_that_products_take(heads: int, width: int, bytes: int) -> None:
    options = SPACE.legal(heads=heads, width=width, bytes=bytes)
    assert options
    for config in options:
        assert config.heads in (16, 32, 64) and config.keys in (16, 32, 64)
        assert config.heads * width <= 128 * 32 * config.warps  # accumulators per thread
    assert options[0].heads >= min(heads, 64 if bytes == 2 else 16)


def test_products_lose_nothing_of_what_is_stored() -> None:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    wanted = {
        ("latent_fp8/512+64", bf16): bf16,
        ("latent_fp8/512+64", fp16): fp32,
        ("latent_fp8/512+64", fp32): fp32,
        ("latent_bf16/512+64", bf16): bf16,
        ("latent_bf16/512+64", fp16): fp32,
        ("latent_fp32/512+64", bf16): fp32,
        ("latent_fp16/512+64", fp16): fp16,
    }
    for (layout, dtype), factor in wanted.items():
        assert factors(dtype, KVLayout.parse(layout)) == factor, (layout, dtype)


def test_what_the_hopper_kernel_takes() -> None:
    for case in sparse_mla_paged.cases:
        inputs = case.make(sparse_mla_paged.inputs, "meta")
        reason = hopper._why_not(**inputs)
        fits = inputs["layout"] == "latent_fp8/512+64" and inputs["q"].dtype == torch.bfloat16
        assert (reason is None) == fits, (case.name, reason)


@pytest.mark.parametrize("divisor", [1, 2, 3, 61, 64, 69, 255, 256, 576, 2**20 + 1, 2**30])
def test_quotients_of_slots_are_exact(divisor: int) -> None:
    factor, shift = hopper.quotient(divisor)
    assert factor < 2**32 and shift < 64
    wholes = [0, 1, 2, 1000, 2**31 // divisor - 1]
    near = {whole * divisor + by for whole in wholes for by in (-1, 0, 1, divisor - 1)}
    for slot in [n for n in near if 0 <= n < 2**31] + [2**31 - 1]:
        assert slot * factor >> shift == slot // divisor


def test_a_block_fits_into_shared_memory() -> None:
    assert hopper.shared_bytes(64) <= 227 << 10


def test_every_thread_arrives_for_itself() -> None:
    """racecheck follows what a thread stored or loaded itself only if that thread arrives."""
    source = (Path(hopper.__file__).parent / "_kernels" / "sparse_decode.cu").read_text()
    assert not re.findall(r"if \(lane[^\n]*\n?[^\n]*barrier_arrive", source)
    counts = re.findall(r"barrier_init\(address\(&s\.(\w+)(?:\[i\])?\), (\w+)\)", source)
    wanted = {"ready": "128", "spent": "384", "full": "128", "empty": "256", "ended": "THREADS"}
    assert dict(counts) == wanted


class Recorded:
    """Stands in for a compiled module and keeps what is launched."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def kernel(self, name: str, device: int) -> "Recorded":
        return self

    def launch(self, *args: Any) -> None:
        self.launches.append(args)


@pytest.mark.parametrize("name", ["empty", "decode", "batch", "plan", "all_options", "heads64"])
def test_a_launch_says_what_the_call_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grid, cluster and the struct of a launch, read back by the layout of `Work` in C."""
    recorded, joined = Recorded(), []
    monkeypatch.setattr(hopper._nvrtc, "module", lambda source, defines: recorded)
    monkeypatch.setattr(hopper._nvrtc, "address", lambda t: 0 if t is None else t.data_ptr())
    monkeypatch.setattr(hopper.processors, "count", lambda device: 132)
    monkeypatch.setattr(hopper, "join", lambda *args: joined.append(args))
    case = next(case for case in sparse_mla_paged.cases if case.name == name)
    inputs = case.make(sparse_mla_paged.inputs, "cpu")
    out, lse = hopper.hopper(**inputs)
    q, k = inputs["q"], inputs["indices"].shape[-1]
    batch, next_n, heads, _ = q.shape
    assert out.shape == (batch, next_n, heads, 512) and lse.shape == (batch, heads, next_n)
    if not batch:
        assert not recorded.launches
        return
    ((grid, block, (work,), shared, cluster, overlap),) = recorded.launches
    assert not overlap  # it reads what the kernel before it may write
    assert len(work) == 208 and block == (hopper.THREADS,) and shared <= 227 << 10
    words = struct.unpack("<20Qf8iIi4x", work)
    assert words[0] == q.data_ptr() and words[1:4] == q.stride()[:3]
    assert words[4] == inputs["pages"].data_ptr() and words[6] == inputs["indices"].data_ptr()
    assert words[14:16] == (out.data_ptr(), lse.data_ptr())
    assert words[21:25] == (batch * next_n, next_n, heads, k)
    span, splits = words[27:29]
    if inputs["schedule"] is None:
        assert splits * span * 64 >= k > (splits - 1) * span * 64
        head_blocks = -(-heads // (64 if heads > 32 else 16))
        assert grid == (batch * next_n * head_blocks, splits)
        assert not joined or cluster is None
    else:
        assert grid[0] == inputs["schedule"].shape[0] and len(joined) == 1 and cluster is None


def test_rows_that_leave_processors_idle_are_cut_into_equal_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded, joined = Recorded(), []
    sources: list[tuple[Any, ...]] = []
    monkeypatch.setattr(hopper._nvrtc, "module", lambda *a: sources.append(a) or recorded)
    monkeypatch.setattr(hopper._nvrtc, "address", lambda t: 0 if t is None else t.data_ptr())
    monkeypatch.setattr(hopper.processors, "count", lambda device: 132)
    monkeypatch.setattr(hopper, "join", lambda *args: joined.append(args))
    q = torch.zeros(100, 1, 128, 576, dtype=torch.bfloat16)
    pages = torch.zeros(2, 64, 656, dtype=torch.uint8)
    indices = torch.zeros(100, 1, 2048, dtype=torch.int32)
    hopper.hopper(q, pages, indices, layout="latent_fp8/512+64", softmax_scale=0.1)
    ((grid, _, (work,), _, cluster, _),) = recorded.launches
    words = struct.unpack("<20Qf8iIi4x", work)
    assert sources[0][1] == (("HEADS", 64), ("MODE", hopper.EVEN))
    assert grid == (132, 1) and cluster is None and words[27:29] == (49, 2)
    part, part_lse, num_splits = joined[0][:3]
    assert part.shape == (200, 128, 512) and part_lse.shape == (200, 128) and num_splits is None
