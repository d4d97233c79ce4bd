"""Cache layouts, byte by byte: records built by hand against what is stored."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from dsa_hal.errors import BadInput, ConfigError
from dsa_hal.model.cache import KVCache
from dsa_hal.ops import gather_index_key, gather_latent, store_index_key, store_latent
from dsa_hal.ops.layout import KVLayout, convert
from dsa_hal.ops.quant import dequantize_groups, quantize_int8

LATENT, INDEX = "latent_fp8/512+64", "index_fp8/128"


def pow2_scale(values: np.ndarray) -> float:
    """2 ** ceil(log2(max|x| / 448)), max|x| at least 1e-4, through the exact exponent of frexp."""
    mantissa, exponent = np.frexp(np.float32(max(np.abs(values).max(), 1e-4)) * np.float32(1 / 448))
    return float(2.0 ** (exponent - 1 if mantissa == 0.5 else exponent))


def e4m3(value: float) -> int:
    """The e4m3 code nearest to a value, ties to the even code, found by search over all codes."""
    table = [
        (c & 7) * 2.0**-9 if c < 8 else (1 + (c & 7) / 8) * 2.0 ** ((c >> 3) - 7)
        for c in range(0x7F)
    ]
    code = min(range(0x7F), key=lambda c: (abs(table[c] - abs(value)), c & 1))
    return code | (0x80 if np.signbit(value) else 0)


def bf16(value: float) -> bytes:
    """The upper two bytes of the fp32, little end first; `value` must fit."""
    return struct.pack("<f", value)[2:]


def latent_record(latent: np.ndarray, rope: np.ndarray) -> bytes:
    """512 codes, 4 fp32 scales, 64 bf16: FlashMLA's 656 bytes."""
    scales = [pow2_scale(group) for group in latent.reshape(4, 128)]
    codes = bytes(e4m3(x / scales[at // 128]) for at, x in enumerate(latent.tolist()))
    return codes + struct.pack("<4f", *scales) + b"".join(bf16(x) for x in rope.tolist())


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_latent_token_is_656_bytes_in_one_piece(page_size: int) -> None:
    torch.manual_seed(0)
    values = torch.randn(2, 576, dtype=torch.bfloat16)
    values[1, 128:256] = 1e-6  # a group below the floor
    values[1, 300] = -700.0
    pages = KVLayout.parse(LATENT).empty(4, page_size)
    slots = [3 * page_size, 2 * page_size + page_size - 1]
    store_latent(pages, values, torch.tensor(slots, dtype=torch.int32), layout=LATENT)
    memory = bytearray(4 * page_size * 656)
    for slot, row in zip(slots, values.float().numpy(), strict=True):
        memory[slot * 656 : slot * 656 + 656] = latent_record(row[:512], row[512:])
    assert pages.numpy().tobytes() == bytes(memory)
    floor = pages.flatten(0, 1)[slots[1], 512:528].view(torch.float32)[1]
    assert floor == 2.0**-22  # the model's floor of 1e-4 on max|x|, not one on the scale


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_index_page_holds_all_values_then_all_scales(page_size: int) -> None:
    torch.manual_seed(1)
    values = torch.randn(2, 128) * 3
    pages = KVLayout.parse(INDEX).empty(3, page_size)
    places = [(1, page_size - 1), (2, 0)]
    slots = torch.tensor([page * page_size + at for page, at in places], dtype=torch.int32)
    store_index_key(pages, values, slots, layout=INDEX)
    memory = bytearray(3 * page_size * 132)
    for (page, at), row in zip(places, values.numpy(), strict=True):
        scale, start = pow2_scale(row), page * page_size * 132
        codes = bytes(e4m3(x / scale) for x in row.tolist())
        memory[start + at * 128 : start + at * 128 + 128] = codes
        struct.pack_into("<f", memory, start + page_size * 128 + at * 4, scale)
    assert pages.numpy().tobytes() == bytes(memory)


def test_sizes_are_the_published_ones() -> None:
    sizes = {LATENT: 656, INDEX: 132, "latent_bf16/512+64": 1152, "index_bf16/128": 256}
    assert {spec: KVLayout.parse(spec).token_bytes for spec in sizes} == sizes


def test_views_share_the_pools_memory() -> None:
    for spec in (LATENT, INDEX, "latent_fp16/512+64", "index_fp32/128"):
        layout = KVLayout.parse(spec)
        pages = layout.empty(2, 5)
        for view in layout.views(pages).values():
            view[1, 4] = torch.ones((), dtype=view.dtype)
        assert int((pages != 0).sum()) > 0
        decoded = layout.decode(layout.views(pages))
        assert decoded[1, 4].eq(1).all() and decoded.sum() == layout.width


def test_mask_covers_a_tokens_bytes_and_no_others() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.bool)
    tokens[1, 2] = True
    for spec, length in ((LATENT, 656), (INDEX, 132)):
        layout = KVLayout.parse(spec)
        pages = layout.empty(2, 3)
        covered = layout.mask(pages, tokens)
        assert int(covered.sum()) == length
        for view in layout.views(covered.view(torch.uint8)).values():
            touched = view.view(torch.uint8).bool().any(-1)
            assert torch.equal(touched, tokens)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (LATENT, "latent_bf16/512+64"),
        (LATENT, "latent_fp32/512+64"),
        (INDEX, "index_bf16/128"),
        ("latent_bf16/512+64", "latent_fp32/512+64"),
        ("index_bf16/128", "index_fp32/128"),
    ],
)
def test_convert_to_wider_and_back_loses_nothing(source: str, target: str) -> None:
    torch.manual_seed(2)
    old, new = KVLayout.parse(source), KVLayout.parse(target)
    pages = old.empty(3, 7)
    for name, part in old.encode(torch.randn(3, 7, old.width) * 5).items():
        old.views(pages)[name].copy_(part)
    values = old.decode(old.views(pages))
    wide = convert(pages, source, target)
    assert torch.equal(new.decode(new.views(wide)), values)
    again = convert(wide, target, source)
    assert torch.equal(old.decode(old.views(again)), values)


def test_convert_rounds_a_narrower_target_once() -> None:
    torch.manual_seed(3)
    pages = torch.randn(2, 3, 576)
    half = convert(pages, "latent_fp32/512+64", "latent_bf16/512+64")
    assert torch.equal(half, pages.to(torch.bfloat16))
    small = convert(pages, "latent_fp32/512+64", LATENT)
    error = (convert(small, LATENT, "latent_fp32/512+64") - pages)[..., :512].abs()
    assert float((error / pages[..., :512].abs().clamp_min(0.05)).max()) <= 2.0**-4


def test_requantising_a_cached_latent_changes_no_value() -> None:
    """With power-of-two scales, what is read back may be stored again."""
    torch.manual_seed(4)
    pages = KVLayout.parse(LATENT).empty(1, 64)
    slots = torch.arange(64, dtype=torch.int32)
    store_latent(pages, torch.randn(64, 576, dtype=torch.bfloat16), slots, layout=LATENT)
    once = gather_latent(pages, slots, layout=LATENT)
    store_latent(pages, once, slots, layout=LATENT)
    assert torch.equal(gather_latent(pages, slots, layout=LATENT), once)


def test_pages_may_lie_apart() -> None:
    """A pool cut out of a larger one, as when layers share an allocation."""
    for spec, store in ((LATENT, store_latent), (INDEX, store_index_key)):
        layout = KVLayout.parse(spec)
        layers = torch.zeros(4, 2, 3, layout.record, dtype=torch.uint8)
        slots = torch.tensor([10, 0], dtype=torch.int32)
        store(layers[:, 1], torch.randn(2, layout.width), slots, layout=spec)
        assert not layers[:, 0].any() and layers[0, 1].any() and layers[3, 1].any()


@pytest.mark.parametrize(
    "spec", ["", "latent", "latent_fp8", "latent_fp8/512", "latent_int4/512+64", "index_fp8/0",
             "index_fp8/128+64", "index_fp8/127", "latent_fp8/512+63", "index_fp8/128 "],
)  # fmt: skip
def test_unknown_layouts_are_refused_with_what_is_known(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"_fp8/"):
        KVLayout.parse(spec)


@pytest.mark.parametrize(
    ("pages", "found"),
    [
        (torch.zeros(2, 4, 655, dtype=torch.uint8), r"\[2, 4, 655\]"),
        (torch.zeros(2, 4, 656, dtype=torch.int8), "int8"),
        (torch.zeros(8, 656, dtype=torch.uint8), r"\[8, 656\]"),
        (torch.zeros(2, 0, 656, dtype=torch.uint8), "holds nothing"),
        (torch.zeros(2, 8, 656, dtype=torch.uint8)[:, ::2], "strides"),
        (torch.zeros(2, 4, 1312, dtype=torch.uint8)[..., ::2], "strides"),
        (torch.zeros(2 * 4 * 656 + 1, dtype=torch.uint8)[1:].view(2, 4, 656), "multiples of 4"),
    ],
)
def test_pages_that_do_not_fit_are_refused(pages: torch.Tensor, found: str) -> None:
    with pytest.raises(BadInput, match=found):
        KVLayout.parse(LATENT).views(pages)
    with pytest.raises(BadInput, match=found):
        gather_latent(pages, torch.zeros(1, dtype=torch.int32), layout=LATENT)


def test_layouts_of_the_other_kind_are_refused() -> None:
    with pytest.raises(BadInput, match="index records"):
        gather_latent(
            KVLayout.parse(INDEX).empty(1, 4), torch.zeros(1, dtype=torch.int32), layout=INDEX
        )
    with pytest.raises(ConfigError, match="same"):
        convert(KVLayout.parse(INDEX).empty(1, 4), INDEX, LATENT)


@pytest.mark.parametrize("slot", [-2, 12, 2**31 - 1])
def test_slots_outside_the_pool_are_named_and_nothing_is_written(slot: int) -> None:
    slots = torch.tensor([0, -1, slot], dtype=torch.int32)
    for spec, store, load in (
        (LATENT, store_latent, gather_latent),
        (INDEX, store_index_key, gather_index_key),
    ):
        layout = KVLayout.parse(spec)
        pages = layout.empty(3, 4)
        with pytest.raises(BadInput, match=rf"slots\[2\] is {slot}; the pool has slots 0 to 11"):
            store(pages, torch.ones(3, layout.width), slots, layout=spec)
        assert not pages.any()
        with pytest.raises(BadInput, match=rf"slots\[2\] is {slot}"):
            load(pages, slots, layout=spec)


# -- int8 and split order ------------------------------------------------------------------------


def int8_codes(values: np.ndarray, scale: np.floating) -> bytes:
    """Codes nearest to values / scale, ties to the even one, at most 127 either way."""
    codes = np.rint(values.astype(np.float32) / np.float32(scale)).clip(-127, 127)
    return codes.astype(np.int8).tobytes()


def test_an_int8_latent_is_codes_then_rope_then_scales() -> None:
    torch.manual_seed(6)
    spec, values = "latent_int8/512+64", torch.randn(2, 576, dtype=torch.bfloat16)
    values[1, 128:256] = 0
    pages = KVLayout.parse(spec).empty(2, 128)
    store_latent(pages, values, torch.tensor([130, 5], dtype=torch.int32), layout=spec)
    memory = bytearray(2 * 128 * 656)
    for slot, row in zip((130, 5), values.float().numpy(), strict=True):
        groups = row[:512].reshape(4, 128)
        scales = np.abs(groups).max(1) / np.float32(127)
        codes = b"".join(
            int8_codes(group, scale) if scale else bytes(128)
            for group, scale in zip(groups, scales, strict=True)
        )
        record = codes + b"".join(bf16(x) for x in row[512:].tolist()) + scales.tobytes()
        memory[slot * 656 : slot * 656 + 656] = record
    assert pages.numpy().tobytes() == bytes(memory)


def test_a_split_pool_holds_part_after_part() -> None:
    """Codes and fp16 scales of index keys; latents and rotated parts. Each part of the whole pool
    is contiguous."""
    torch.manual_seed(7)
    spec, values = "index_int8_split/128", torch.randn(2, 128) * 3
    pages = KVLayout.parse(spec).empty(3, 16)
    store_index_key(pages, values, torch.tensor([47, 0], dtype=torch.int32), layout=spec)
    memory = bytearray(3 * 16 * 130)
    for slot, row in zip((47, 0), values.numpy(), strict=True):
        scale = np.float16(np.abs(row).max() / np.float32(127))
        memory[slot * 128 : slot * 128 + 128] = int8_codes(row, scale)
        memory[3 * 16 * 128 + 2 * slot : 3 * 16 * 128 + 2 * slot + 2] = scale.tobytes()
    assert pages.numpy().tobytes() == bytes(memory)

    spec, latent = "latent_bf16_split/512+64", torch.randn(48, 576, dtype=torch.bfloat16)
    pages = KVLayout.parse(spec).empty(3, 16)
    store_latent(pages, latent, torch.arange(48, dtype=torch.int32), layout=spec)
    parts = KVLayout.parse(spec).views(pages)
    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        "latent": (3, 16, 512), "rope": (3, 16, 64),
    }  # fmt: skip
    assert all(part.is_contiguous() for part in parts.values())
    assert torch.equal(parts["latent"].view(48, 512), latent[:, :512])
    assert torch.equal(pages.flatten()[: 48 * 512], latent[:, :512].flatten())


def test_a_piece_of_a_split_pool_is_none() -> None:
    spec = "latent_bf16_split/512+64"
    pages = KVLayout.parse(spec).empty(4, 16)
    with pytest.raises(BadInput, match="contiguous as a whole"):
        gather_latent(pages[::2], torch.zeros(1, dtype=torch.int32), layout=spec)
    wide = torch.zeros(4, 2, 16, 576, dtype=torch.bfloat16)[:, 0]
    with pytest.raises(BadInput, match="contiguous as a whole"):
        store_latent(wide, torch.zeros(1, 576), torch.zeros(1, dtype=torch.int32), layout=spec)


@pytest.mark.parametrize(
    "spec", [LATENT, INDEX, "latent_bf16_split/32+8", "latent_int8/128+8", "index_int8_split/32",
             "index_int8/32", "index_fp32/16"],
)  # fmt: skip
def test_pools_grow_and_keep_their_contents(spec: str) -> None:
    torch.manual_seed(8)
    layout = KVLayout.parse(spec)
    pages = layout.empty(3, 16)
    for name, part in layout.encode(torch.randn(3, 16, layout.width)).items():
        layout.views(pages)[name].copy_(part)
    before = layout.decode(layout.views(pages))
    more = layout.grown(pages, 5)
    after = layout.decode(layout.views(more))
    assert more.shape == (5, *pages.shape[1:]) and more.dtype == pages.dtype
    assert torch.equal(after[:3], before) and not after[3:].any()


def test_a_cache_of_split_pools_grows() -> None:
    latent, index = KVLayout.parse("latent_bf16_split/32+8"), KVLayout.parse("index_int8_split/16")
    cache = KVCache(2, latent, index, 2, 16)
    slots = torch.tensor([3, 30], dtype=torch.int32)
    values = torch.randn(2, 40, dtype=torch.bfloat16)
    store_latent(cache.latent[1], values, slots, layout=latent.spec)
    cache.grow(7)
    assert torch.equal(gather_latent(cache.latent[1], slots, layout=latent.spec), values)
    assert (cache.num_pages, cache.free_pages) == (7, 7)
    assert all(pool.shape[0] == 7 for pool in (*cache.latent, *cache.index))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("latent_bf16/512+64", "latent_bf16_split/512+64"),
        ("index_int8/128", "index_int8_split/128"),
        ("index_int8_split/128", "index_fp32/128"),
        ("latent_bf16_split/512+64", "latent_fp32_split/512+64"),
    ],
)
def test_convert_moves_values_between_orders(source: str, target: str) -> None:
    torch.manual_seed(9)
    old, new = KVLayout.parse(source), KVLayout.parse(target)
    pages = old.empty(3, 16)
    for name, part in old.encode(torch.randn(3, 16, old.width) * 5).items():
        old.views(pages)[name].copy_(part)
    there = convert(pages, source, target)
    assert torch.equal(new.decode(new.views(there)), old.decode(old.views(pages)))
    assert torch.equal(convert(there, target, source), pages)


def test_int8_rounds_to_even_and_saturates() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0, 126.6]])
    codes, scale = quantize_int8(x, group=6)
    assert scale.tolist() == [[1.0]]
    assert codes.tolist() == [[127, 0, 2, -2, -127, 127]]
    torch.manual_seed(10)
    wide = torch.randn(50, 256) * torch.logspace(-9, 9, 50)[:, None]
    codes, scale = quantize_int8(wide, group=128, scale_dtype=torch.float16)
    assert scale.dtype == torch.float16 and scale.isfinite().all()
    assert int(codes.abs().max()) == 127 and int(codes.min()) == -127
    plain = (scale > 6.2e-5) & (scale < 65504)  # neither subnormal nor at the end
    back = dequantize_groups(codes, scale, group=128)
    error = (back - wide).abs().unflatten(1, (2, 128)).amax(-1)
    assert (error <= 0.57 * scale.float())[plain].all()
    assert not quantize_int8(torch.zeros(2, 128), group=128)[0].any()
