"""What decides where decoding's work is done, on any machine: splits, tiles, predicates."""

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
    assert splits_of(128, 32, 132, 32) == splits_of(256, 32, 132, 32) == 1  # waves are full as they are
    assert splits_of(70000, 32, 132, 32) == 1


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
