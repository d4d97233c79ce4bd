"""Writing tokens into the caches and reading them back, whatever the layout (see layout.py).

A slot is page * page_size + offset in the page. Slot -1 means no token: nothing is written, zeros
are read.
"""

import torch
from torch import Tensor

from dsa_hal.case import Cost, Inputs, Maker, case
from dsa_hal.check import bitwise, each
from dsa_hal.ops.layout import SCALE, KVLayout, misfit
from dsa_hal.registry import op

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def _pool(make: Maker, layout: str, pages: int, page_size: int) -> Tensor:
    """A pool with something in every byte, so that a stray write shows."""
    known = KVLayout.parse(layout)
    if known.element == torch.uint8:
        return make.randint(0, 256, pages, page_size, known.record, dtype=torch.uint8)
    return make.randn(pages, page_size, known.record, dtype=known.element)


def _slots(make: Maker, tokens: int, room: int, holes: str) -> Tensor:
    """Distinct slots in random order; "some": every third is -1, "all": every one is."""
    if holes == "all":
        return make.tensor([-1] * tokens)
    slots = make.permutation(room)[:tokens]
    if holes == "some":
        slots[::3] = -1
    return slots


def _misplaced(values: Tensor, slots: Tensor, name: str, width: int) -> str | None:
    if values.dtype not in FLOATS or values.dim() != 2 or values.shape[1] != width:
        return (
            f"{name} is {values.dtype} {list(values.shape)};"
            f" expected bfloat16, float16 or float32 [tokens, {width}]"
        )
    return _no_slots(slots, values.shape[0])


def _no_slots(slots: Tensor, tokens: int) -> str | None:
    if slots.dtype != torch.int32 or list(slots.shape) != [tokens]:
        return f"slots are {slots.dtype} {list(slots.shape)}; expected int32 [{tokens}]"
    return None


def _with_a_spare(view: Tensor) -> Tensor:
    """A part's bytes by slot [slots + 1, bytes], as a copy; the last row, zeros, stands for -1."""
    flat = view.view(torch.uint8).flatten(0, 1)
    return torch.cat([flat, flat.new_zeros(1, flat.shape[1])])


def _rows(slots: Tensor, pages: Tensor) -> Tensor:
    """Slots as rows of `_with_a_spare`."""
    return torch.where(slots < 0, pages.shape[0] * pages.shape[1], slots).long()


def _store(pages: Tensor, values: Tensor, slots: Tensor, layout: str, pow2: bool) -> None:
    known = KVLayout.parse(layout)
    encoded = known.encode(values, pow2=pow2)
    for name, view in known.views(pages).items():
        filled, raw = _with_a_spare(view), view.view(torch.uint8)
        part = torch.empty(encoded[name].shape, dtype=view.dtype, device=view.device)
        filled[_rows(slots, pages)] = part.copy_(encoded[name]).view(torch.uint8)
        raw.copy_(filled[:-1].view(raw.shape))


def _load(pages: Tensor, slots: Tensor, layout: str) -> dict[str, Tensor]:
    views = KVLayout.parse(layout).views(pages)
    rows = _rows(slots, pages)
    return {name: _with_a_spare(view)[rows].view(view.dtype) for name, view in views.items()}


def _unread_pages(pages: Tensor, slots: Tensor, *, layout: str) -> dict[str, Tensor]:
    read = torch.zeros(pages.shape[0] * pages.shape[1] + 1, dtype=torch.bool, device=pages.device)
    read[_rows(slots, pages)] = True
    return {"pages": ~KVLayout.parse(layout).mask(pages, read[:-1].view(pages.shape[:2]))}


_SIZES = ("layout", "page_size", "holes")
_ROOM = (  # name, tokens, pages, page_size, holes
    ("no_tokens", 0, 2, 64, "none"),
    ("page1", 63, 70, 1, "none"),
    ("page3", 20, 7, 3, "some"),
    ("page16", 65, 9, 16, "some"),
    ("page64", 130, 3, 64, "none"),
    ("page128", 7, 2, 128, "some"),
    ("skipped", 5, 1, 64, "all"),
    ("no_pool", 2, 0, 64, "all"),
)


# -- store_latent -------------------------------------------------------------------------------


def _store_inputs(
    make: Maker, *, tokens: int, pages: int, page_size: int, layout: str, holes: str = "none",
    values: str = "bf16",
) -> Inputs:  # fmt: skip
    dtype = torch.float32 if values == "fp32" else torch.bfloat16
    latent = make.randn(tokens, KVLayout.parse(layout).width, dtype=dtype)
    if values == "tiny":
        latent = latent * 1e-6
    slots = _slots(make, tokens, pages * page_size, holes)
    return dict(
        pages=_pool(make, layout, pages, page_size), latent=latent, slots=slots, layout=layout
    )


def _store_cost(pages: Tensor, latent: Tensor, slots: Tensor, *, layout: str) -> Cost:
    record = KVLayout.parse(layout).token_bytes
    moved = latent.numel() * latent.element_size() + slots.numel() * (4 + record)
    return Cost(3.0 * latent.numel(), moved)


def _store_invalid(pages: Tensor, latent: Tensor, slots: Tensor, *, layout: str) -> str | None:
    return misfit(pages, layout, "latent") or _misplaced(
        latent, slots, "latent", KVLayout.parse(layout).width
    )


def _store_unread(
    pages: Tensor, latent: Tensor, slots: Tensor, *, layout: str
) -> dict[str, Tensor]:
    return {"latent": (slots < 0)[:, None].expand(latent.shape)}


@op(
    version=1,
    constant=(*_SIZES, "values"),
    variable={"tokens": "latent[0]", "pages": "pages[0]"},
    inputs=_store_inputs,
    cases=(
        *(
            case(name, tokens=tokens, pages=pages, page_size=size, holes=holes,
                 layout="latent_fp8/512+64")
            for name, tokens, pages, size, holes in _ROOM
        ),
        case("floor", tokens=9, pages=1, page_size=64, layout="latent_fp8/512+64", values="tiny",
             traps=(8, 9, 10)),
        case("from_fp32", tokens=9, pages=2, page_size=5, layout="latent_fp8/512+64",
             values="fp32"),
        case("small", tokens=9, pages=2, page_size=5, layout="latent_fp8/64+16"),
        case("bf16", tokens=33, pages=3, page_size=16, layout="latent_bf16/512+64", holes="some"),
        case("fp16", tokens=33, pages=3, page_size=16, layout="latent_fp16/512+64"),
        case("fp32", tokens=33, pages=3, page_size=16, layout="latent_fp32/512+64", values="fp32"),
        case("split", tokens=33, pages=2, page_size=128, layout="latent_bf16_split/512+64",
             holes="some", traps=(10,)),
        case("int8", tokens=33, pages=2, page_size=128, layout="latent_int8/512+64", holes="some"),
        case("decode_128", model=True, tokens=128, pages=64, page_size=64,
             layout="latent_fp8/512+64"),
        case("prefill_8k", model=True, tokens=8192, pages=160, page_size=64,
             layout="latent_fp8/512+64"),
        case("prefill_8k_bf16", model=True, tokens=8192, pages=160, page_size=64,
             layout="latent_bf16/512+64"),
    ),
    check=each(pages=bitwise),
    cost=_store_cost,
    outputs=(),
    mutates=("pages",),
    invalid=_store_invalid,
    unread=_store_unread,
)  # fmt: skip
def store_latent(pages: Tensor, latent: Tensor, slots: Tensor, *, layout: str) -> None:
    """Write each token's latent and rotated key part into its slot.

    pages   [pages, page_size, record] pool in `layout`; only the named slots change
    latent  [tokens, lora + rope] bf16, fp16 or fp32, normalised and rotated
    slots   [tokens] int32, distinct; -1 skips the token. A slot outside the pool is an error; what
            checks it raises BadInput
    layout  FP8 layouts quantise the latent in groups of 128 with power-of-two scales and
            max|x| >= 1e-4, int8 layouts as `quantize_int8` says, and both keep the rotated part in
            bf16; others convert

    Source: the KV cache of FlashMLA's sparse decode, quantised by `act_quant` of the model's demo
    code.
    """
    _store(pages, latent, slots, layout, True)


# -- store_index_key ----------------------------------------------------------------------------


def _store_key_inputs(make: Maker, *, pow2: bool = True, **axes: object) -> Inputs:
    made = _store_inputs(make, **axes)  # type: ignore[arg-type]
    return dict(pages=made["pages"], k=made["latent"], slots=made["slots"], layout=made["layout"],
                pow2=pow2)  # fmt: skip


def _store_key_cost(
    pages: Tensor, k: Tensor, slots: Tensor, *, layout: str, pow2: bool = True
) -> Cost:
    return _store_cost(pages, k, slots, layout=layout)


def _store_key_invalid(
    pages: Tensor, k: Tensor, slots: Tensor, *, layout: str, pow2: bool = True
) -> str | None:
    return misfit(pages, layout, "index") or _misplaced(k, slots, "k", KVLayout.parse(layout).width)


def _store_key_unread(
    pages: Tensor, k: Tensor, slots: Tensor, *, layout: str, pow2: bool = True
) -> dict[str, Tensor]:
    return {"k": (slots < 0)[:, None].expand(k.shape)}


@op(
    version=1,
    constant=(*_SIZES, "values", "pow2"),
    variable={"tokens": "k[0]", "pages": "pages[0]"},
    inputs=_store_key_inputs,
    cases=(
        *(
            case(name, tokens=tokens, pages=pages, page_size=size, holes=holes,
                 layout="index_fp8/128", traps=(10,))
            for name, tokens, pages, size, holes in _ROOM
        ),
        case("floor", tokens=9, pages=1, page_size=64, layout="index_fp8/128", values="tiny",
             traps=(8,)),
        case("any_scale", tokens=9, pages=2, page_size=64, layout="index_fp8/128", pow2=False),
        case("head64", tokens=9, pages=2, page_size=64, layout="index_fp8/64", values="fp32"),
        case("bf16", tokens=33, pages=3, page_size=16, layout="index_bf16/128", holes="some"),
        case("fp32", tokens=33, pages=3, page_size=16, layout="index_fp32/128", values="fp32"),
        case("int8", tokens=9, pages=3, page_size=64, layout="index_int8/128", values="tiny"),
        case("int8_split", tokens=33, pages=2, page_size=128, layout="index_int8_split/128",
             holes="some", traps=(10,)),
        case("decode_128", model=True, tokens=128, pages=64, page_size=64, layout="index_fp8/128"),
        case("prefill_8k", model=True, tokens=8192, pages=160, page_size=64,
             layout="index_fp8/128"),
    ),
    check=each(pages=bitwise),
    cost=_store_key_cost,
    outputs=(),
    mutates=("pages",),
    invalid=_store_key_invalid,
    unread=_store_key_unread,
)  # fmt: skip
def store_index_key(
    pages: Tensor, k: Tensor, slots: Tensor, *, layout: str, pow2: bool = True
) -> None:
    """Write each token's indexer key into its slot.

    pages   [pages, page_size, record] pool in `layout`; only the named slots change
    k       [tokens, dim] bf16, fp16 or fp32: normalised, rotated and, for layouts with scales,
            Hadamard transformed
    slots   [tokens] int32, distinct; -1 skips the token. A slot outside the pool is an error; what
            checks it raises BadInput
    layout  FP8 and int8 layouts quantise the key with one scale over the whole head, the latter as
            `quantize_int8` says; others convert
    pow2    scales of FP8 layouts are powers of two

    Source: the index cache of DeepGEMM's `fp8_paged_mqa_logits`, quantised by `act_quant` of the
    model's demo code.
    """
    _store(pages, k, slots, layout, pow2)


# -- gather_latent ------------------------------------------------------------------------------


def _gather_inputs(
    make: Maker, *, tokens: int, pages: int, page_size: int, layout: str, holes: str = "none",
    repeats: bool = False,
) -> Inputs:  # fmt: skip
    known = KVLayout.parse(layout)
    pool = known.empty(pages, page_size, make.device)
    encoded = known.encode(make.randn(pages, page_size, known.width))
    for name, view in known.views(pool).items():
        view.copy_(encoded[name])
    slots = _slots(make, tokens, pages * page_size, holes)
    return dict(pages=pool, slots=slots // 2 if repeats else slots, layout=layout)


def _latent_inputs(make: Maker, *, fp32: bool = False, **axes: object) -> Inputs:
    made = _gather_inputs(make, **axes)  # type: ignore[arg-type]
    return dict(**made, out_dtype=torch.float32 if fp32 else torch.bfloat16)


def _latent_cost(
    pages: Tensor, slots: Tensor, *, layout: str, out_dtype: torch.dtype = torch.bfloat16
) -> Cost:
    known = KVLayout.parse(layout)
    written = known.width * out_dtype.itemsize
    return Cost(slots.numel() * known.width, slots.numel() * (4 + known.token_bytes + written))


def _latent_invalid(
    pages: Tensor, slots: Tensor, *, layout: str, out_dtype: torch.dtype = torch.bfloat16
) -> str | None:
    if out_dtype not in FLOATS:
        return f"out_dtype is {out_dtype}; expected bfloat16, float16 or float32"
    return misfit(pages, layout, "latent") or _no_slots(slots, slots.numel())


def _latent_unread(
    pages: Tensor, slots: Tensor, *, layout: str, out_dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    return _unread_pages(pages, slots, layout=layout)


@op(
    version=1,
    constant=(*_SIZES, "repeats", "fp32"),
    variable={"tokens": "slots[0]", "pages": "pages[0]"},
    inputs=_latent_inputs,
    cases=(
        *(
            case(name, tokens=tokens, pages=pages, page_size=size, holes=holes,
                 layout="latent_fp8/512+64", traps=(10,))
            for name, tokens, pages, size, holes in _ROOM
        ),
        case("repeats", tokens=60, pages=1, page_size=64, layout="latent_fp8/512+64",
             repeats=True, fp32=True),
        case("small", tokens=9, pages=2, page_size=5, layout="latent_fp8/64+16"),
        case("bf16", tokens=33, pages=3, page_size=16, layout="latent_bf16/512+64", holes="some"),
        case("fp32", tokens=33, pages=3, page_size=16, layout="latent_fp32/512+64", fp32=True),
        case("split", tokens=33, pages=2, page_size=128, layout="latent_bf16_split/512+64",
             holes="some", traps=(10,)),
        case("int8", tokens=33, pages=2, page_size=128, layout="latent_int8/512+64", holes="some"),
        case("prefix_8k", model=True, tokens=8192, pages=160, page_size=64,
             layout="latent_fp8/512+64"),
        case("prefix_128k", model=True, tokens=131072, pages=2100, page_size=64,
             layout="latent_fp8/512+64"),
    ),
    check=each(out=bitwise),
    cost=_latent_cost,
    invalid=_latent_invalid,
    unread=_latent_unread,
)  # fmt: skip
def gather_latent(
    pages: Tensor, slots: Tensor, *, layout: str, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The latents in some slots, de-quantised: what prefill needs of a cached prefix.

    pages      [pages, page_size, record] pool in `layout`
    slots      [tokens] int32, repeats allowed; -1 gives zeros. Other slots are not read. A slot
               outside the pool is an error; what checks it raises BadInput
    out_dtype  value times scale is formed in fp32 and rounded once
    -> out     [tokens, lora + rope] out_dtype

    Source: the cache that FlashMLA's sparse decode reads.
    """
    known = KVLayout.parse(layout)
    return known.decode(_load(pages, slots, layout)).to(out_dtype)


# -- gather_index_key ---------------------------------------------------------------------------


def _key_cost(pages: Tensor, slots: Tensor, *, layout: str) -> Cost:
    return Cost(slots.numel(), slots.numel() * (8 + 2.0 * KVLayout.parse(layout).token_bytes))


def _key_invalid(pages: Tensor, slots: Tensor, *, layout: str) -> str | None:
    return misfit(pages, layout, "index") or _no_slots(slots, slots.numel())


@op(
    version=1,
    constant=(*_SIZES, "repeats"),
    variable={"tokens": "slots[0]", "pages": "pages[0]"},
    inputs=_gather_inputs,
    cases=(
        *(
            case(name, tokens=tokens, pages=pages, page_size=size, holes=holes,
                 layout="index_fp8/128", traps=(10,))
            for name, tokens, pages, size, holes in _ROOM
        ),
        case("repeats", tokens=60, pages=1, page_size=64, layout="index_fp8/64", repeats=True),
        case("bf16", tokens=33, pages=3, page_size=16, layout="index_bf16/128", holes="some"),
        case("fp32", tokens=33, pages=3, page_size=16, layout="index_fp32/128"),
        case("int8", tokens=9, pages=3, page_size=64, layout="index_int8/128"),
        case("int8_split", tokens=33, pages=2, page_size=128, layout="index_int8_split/128",
             holes="some", traps=(10,)),
        case("prefix_8k", model=True, tokens=8192, pages=160, page_size=64,
             layout="index_fp8/128"),
        case("prefix_128k", model=True, tokens=131072, pages=2100, page_size=64,
             layout="index_fp8/128"),
    ),
    check=each(k=bitwise, scale=bitwise),
    cost=_key_cost,
    outputs=("k", "scale"),
    invalid=_key_invalid,
    unread=_unread_pages,
)  # fmt: skip
def gather_index_key(pages: Tensor, slots: Tensor, *, layout: str) -> tuple[Tensor, Tensor]:
    """The indexer keys in some slots, as stored: what `indexer_logits` takes of a cached prefix.

    pages     [pages, page_size, record] pool in `layout`
    slots     [tokens] int32, repeats allowed; -1 gives zeros and scale 0. Other slots are not read.
              A slot outside the pool is an error; what checks it raises BadInput
    -> k      [tokens, dim] in the layout's own dtype
    -> scale  [tokens] fp32; ones where the layout has no scales

    Source: the index cache that DeepGEMM's `fp8_paged_mqa_logits` reads.
    """
    parts = _load(pages, slots, layout)
    k = parts[KVLayout.parse(layout).parts[0].name]
    scale = parts[SCALE][:, 0].float() if SCALE in parts else torch.where(slots < 0, 0.0, 1.0)
    return k, scale
