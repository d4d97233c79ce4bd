"""Cache layouts as data: what one token's record holds, and how records lie inside a page.

A pool is one tensor `pages` [pages, page_size, record]. Slot s is record s % page_size of page
s // page_size. Four orders exist, and mixing them up is silent. In "token" order each record lies
in one piece (FlashMLA's 656 bytes). In "page" order a page holds one part of all its tokens, then
the next part of all of them (DeepGEMM's 132 bytes, where the record axis only counts bytes).
"tile" order is page order with the first part cut into squares of 16 tokens by 16 elements, square
after square (AITER's preshuffled keys): few kernels read it, none here writes it but `convert`.
In "split" order the whole pool holds one part of all its tokens, then the next part of all of them,
so that each part is a pool of its own (what torch_npu takes): the first axis only counts, and a
piece of such a pool is no pool. It grows by `grown`.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_hal.errors import BadInput, ConfigError
from dsa_hal.ops.quant import blocks, dequantize_groups, quantize_fp8, quantize_int8

SCALE = "scale"
"""Name of the part that holds the scales of the first part."""

TILE = 16
"""Tokens, and elements, of a square of "tile" order."""


@dataclass(frozen=True)
class Part:
    """One piece of a token's record: `count` elements of `dtype`."""

    name: str
    dtype: torch.dtype
    count: int

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * self.count


class _Form(NamedTuple):
    """A layout before its sizes are known. Parts stand in memory order; every part but the scales
    takes its count from the spec, in the same order."""

    kind: str
    order: str
    group: int
    element: torch.dtype
    parts: tuple[tuple[str, torch.dtype], ...]


_E4M3, _INT8 = torch.float8_e4m3fn, torch.int8
_FP32, _BF16, _FP16 = torch.float32, torch.bfloat16, torch.float16
_FLOATS = {"bf16": _BF16, "fp16": _FP16, "fp32": _FP32}
_WHOLE = 1 << 30
"""A scale group that covers any head."""

_FORMS = {
    "latent_fp8": _Form(
        "latent", "token", 128, torch.uint8, (("latent", _E4M3), (SCALE, _FP32), ("rope", _BF16))
    ),
    "index_fp8": _Form("index", "page", _WHOLE, torch.uint8, (("key", _E4M3), (SCALE, _FP32))),
    "index_fp8_tiled": _Form(
        "index", "tile", _WHOLE, torch.uint8, (("key", _E4M3), (SCALE, _FP32))
    ),
    "latent_int8": _Form(
        "latent", "token", 128, torch.uint8, (("latent", _INT8), ("rope", _BF16), (SCALE, _FP32))
    ),
    **{
        f"index_int8{suffix}": _Form(
            "index", order, _WHOLE, torch.uint8, (("key", _INT8), (SCALE, _FP16))
        )
        for suffix, order in (("", "page"), ("_split", "split"))
    },
    **{
        f"latent_{name}{suffix}": _Form(
            "latent", order, 0, dtype, (("latent", dtype), ("rope", dtype))
        )
        for suffix, order in (("", "token"), ("_split", "split"))
        for name, dtype in _FLOATS.items()
    },
    **{
        f"index_{name}": _Form("index", "token", 0, _FLOATS[name], (("key", _FLOATS[name]),))
        for name in ("bf16", "fp32")
    },
}

_SPEC = re.compile(r"([a-z0-9_]+)/([1-9]\d*(?:\+[1-9]\d*)*)")


@dataclass(frozen=True)
class KVLayout:
    """How a cache stores one token.

    spec     the layout's name and sizes, as `parse` reads it
    kind     "latent" (MLA's latent and rotated key part) or "index" (the indexer's keys)
    parts    pieces of a record in memory order
    order    "token": record after record; "page": part after part within a page; "tile": as "page",
             the first part in squares; "split": part after part within the pool
    group    elements of the first part per scale; 0 = no scales
    element  dtype of `pages`: the parts' own, or uint8 where they differ
    """

    spec: str
    kind: str
    parts: tuple[Part, ...]
    order: str
    group: int
    element: torch.dtype

    @staticmethod
    @lru_cache(maxsize=64)
    def parse(spec: str) -> "KVLayout":
        """The layout called `spec`, a form and its sizes: "latent_fp8/512+64", "index_bf16/128".

        Raises ConfigError for anything that is not a known form with sizes that fit it.
        """
        match = _SPEC.fullmatch(spec)
        form = _FORMS.get(match[1]) if match else None
        if match is None or form is None:
            known = ", ".join(f"{name}/{_SIZES[f.kind]}" for name, f in sorted(_FORMS.items()))
            raise ConfigError(f"unknown cache layout {spec!r}; known are {known} (any sizes)")
        sizes = [int(size) for size in match[2].split("+")]
        like = f"{match[1]}/{_SIZES[form.kind]}"
        if len(sizes) != like.count("+") + 1:
            raise ConfigError(f"cache layout {spec!r} has {len(sizes)} sizes; it is written {like}")
        group = min(form.group, sizes[0])
        counts = iter(sizes)
        parts = tuple(
            Part(name, dtype, blocks(sizes[0], group) if name == SCALE else next(counts))
            for name, dtype in form.parts
        )
        ends = tuple(accumulate(part.bytes for part in parts))
        for part, start in zip(parts, (0, *ends), strict=False):
            if start % part.dtype.itemsize or ends[-1] % part.dtype.itemsize:
                raise ConfigError(
                    f"cache layout {spec!r}: {part.name} would start at byte {start} of {ends[-1]},"
                    f" which {part.dtype} cannot; take sizes like {like}"
                )
        if form.order == "tile" and sizes[0] % TILE:
            raise ConfigError(
                f"cache layout {spec!r} has keys of {sizes[0]}; squares take multiples of {TILE}"
            )
        return KVLayout(spec, form.kind, parts, form.order, group, form.element)

    @property
    def data(self) -> tuple[Part, ...]:
        """The parts that hold values, which is all but the scales."""
        return tuple(part for part in self.parts if part.name != SCALE)

    @property
    def width(self) -> int:
        """Values per token: 576 for a latent of 512 + 64, 128 for an index key."""
        return sum(part.count for part in self.data)

    @property
    def rows(self) -> "KVLayout":
        """The layout with the same parts whose tokens have their elements in a row: itself, but for
        "tile" order."""
        return KVLayout.parse(self.spec.replace("_tiled/", "/"))

    @property
    def codes(self) -> str:
        """What the first part is quantised to, "fp8" or "int8"; "none" where it is not."""
        if not self.group:
            return "none"
        return "int8" if self.parts[0].dtype == _INT8 else "fp8"

    @property
    def token_bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def record(self) -> int:
        """Size of the last axis of `pages`."""
        return self.token_bytes // self.element.itemsize

    def empty(
        self, num_pages: int, page_size: int, device: torch.device | str | None = None
    ) -> Tensor:
        """A pool of zeros [num_pages, page_size, record]; a zero record decodes to zeros."""
        return torch.zeros(num_pages, page_size, self.record, dtype=self.element, device=device)

    def grown(self, pages: Tensor, num_pages: int) -> Tensor:
        """A pool of `num_pages` that begins with the contents of `pages`, of which it has no fewer;
        a copy."""
        out = self.empty(num_pages, pages.shape[1], pages.device)
        old, new = (self._pieces(p) if self.order == "split" else {"": p} for p in (pages, out))
        for name, piece in new.items():
            piece[: pages.shape[0]] = old[name]
        return out

    def why_not(self, pages: Tensor) -> str | None:
        """Why `pages` is no pool of this layout, or None. Pages may lie apart, but in split order;
        inside a page there are no gaps."""
        if pages.dtype != self.element or pages.dim() != 3 or pages.shape[2] != self.record:
            return (
                f"pages are {pages.dtype} {list(pages.shape)}; layout {self.spec} is"
                f" {self.element} [pages, page_size, {self.record}]"
            )
        page_size = pages.shape[1]
        if page_size < 1:
            return f"pages have shape {list(pages.shape)}; a page of 0 tokens holds nothing"
        if pages.stride(2) != 1 or (page_size > 1 and pages.stride(1) != self.record):
            return (
                f"pages have strides {list(pages.stride())}; inside a page of layout {self.spec}"
                f" they must be {self.record} and 1"
            )
        if self.order == "split" and not pages.is_contiguous():
            return (
                f"pages have strides {list(pages.stride())}; a pool of layout {self.spec} must be"
                " contiguous as a whole"
            )
        if self.order == "tile" and page_size % TILE:
            return f"pages hold {page_size} tokens; layout {self.spec} takes multiples of {TILE}"
        align = max(part.dtype.itemsize for part in self.parts) // self.element.itemsize
        apart = pages.stride(0) if pages.shape[0] > 1 else 0
        if pages.storage_offset() % align or apart % align:
            return (
                f"pages start at element {pages.storage_offset()} and lie {apart} apart;"
                f" layout {self.spec} needs multiples of {align}"
            )
        return None

    def views(self, pages: Tensor) -> dict[str, Tensor]:
        """Each part as a typed view [pages, page_size, count] into the memory of `pages`.

        Raises BadInput where shape, dtype, gaps or alignment do not fit the layout, and for "tile"
        order, in which a token's elements have no common stride.
        """
        if (reason := self.why_not(pages)) is not None:
            raise BadInput(reason)
        if self.order == "tile":
            raise BadInput(
                f"layout {self.spec} keeps keys in squares, which this cannot read; `convert` makes"
                f" it {self.rows.spec}"
            )
        cut = self._pieces(pages)
        return {part.name: cut[part.name].view(part.dtype) for part in self.parts}

    def mask(self, pages: Tensor, tokens: Tensor) -> Tensor:
        """`tokens` (bool [pages, page_size]) as a mask over the elements of `pages`, whatever the
        order: what these tokens' records occupy."""
        if self.order == "tile":
            return tiled(self.rows.mask(pages, tokens), self)
        out = torch.zeros(pages.shape, dtype=torch.bool, device=pages.device)
        for piece in self._pieces(out).values():
            piece.copy_(tokens[..., None].expand_as(piece))
        return out

    def quantized(self, values: Tensor, *, pow2: bool = True) -> tuple[Tensor, Tensor]:
        """The first part, and the scales, of records that begin with `values`, where it has scales.
        `pow2` is about those of FP8."""
        if self.codes == "int8":
            scale = next(part.dtype for part in self.parts if part.name == SCALE)
            return quantize_int8(values, group=self.group, scale_dtype=scale)
        return quantize_fp8.reference(values, group=self.group, pow2=pow2)

    def encode(self, values: Tensor, *, pow2: bool = True) -> dict[str, Tensor]:
        """The parts of the records that store `values` [..., width], in their stored dtypes."""
        out: dict[str, Tensor] = {}
        at = 0
        for part in self.data:
            piece = values[..., at : at + part.count]
            at += part.count
            if self.group and part is self.parts[0]:
                out[part.name], out[SCALE] = self.quantized(piece, pow2=pow2)
            else:
                out[part.name] = piece.to(part.dtype)
        return out

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """The values [..., width] fp32 that `parts` store; the inverse of `encode`, but for its
        rounding."""
        first, *rest = (parts[part.name] for part in self.data)
        if self.group:
            first = dequantize_groups(first, parts[SCALE], group=self.group)
        return torch.cat([first.float(), *(part.float() for part in rest)], -1)

    def _pieces(self, pages: Tensor) -> dict[str, Tensor]:
        """Part -> its elements, still of the pool's dtype, [pages, page_size, elements]."""
        out: dict[str, Tensor] = {}
        at, size = 0, self.element.itemsize
        for part in self.parts:
            length = part.bytes // size
            if self.order == "token":
                out[part.name] = pages[..., at : at + length]
                at += length
            elif self.order == "split":
                count, page_size = pages.shape[:2]
                end = at + length * count * page_size
                out[part.name] = pages.view(-1)[at:end].view(count, page_size, length)
                at = end
            else:
                count, page_size = pages.shape[:2]
                shape, strides = (count, page_size, length), (pages.stride(0), length, 1)
                out[part.name] = pages.as_strided(shape, strides, pages.storage_offset() + at)
                at += length * page_size
        return out


_SIZES = {"latent": "512+64", "index": "128"}
"""The model's sizes of each kind, as examples in messages."""


def tiled(pages: Tensor, form: KVLayout) -> Tensor:
    """A copy of `pages`, of layout `form.rows`, in layout `form`, which is in tile order; or of a
    mask over such pages. Raises BadInput for pages of a size that has no squares."""
    return _transposed(pages, form, (TILE, form.parts[0].count // TILE))


def untiled(pages: Tensor, form: KVLayout) -> Tensor:
    """The inverse of `tiled`."""
    return _transposed(pages, form, (form.parts[0].count // TILE, TILE))


def _transposed(pages: Tensor, form: KVLayout, shape: tuple[int, int]) -> Tensor:
    """Each 16 tokens' keys as two axes of pieces of 16 elements, which change places."""
    count, page_size, record = pages.shape
    if page_size % TILE or record != form.record:
        raise BadInput(
            f"pages have shape {list(pages.shape)}; layout {form.spec} is [pages, page_size,"
            f" {form.record}] with a page_size of multiples of {TILE}"
        )
    out = pages.clone(memory_format=torch.contiguous_format)
    keys = out.view(count, page_size * record)[:, : page_size * form.parts[0].count]
    squares = keys.reshape(count, page_size // TILE, *shape, TILE)
    keys.copy_(squares.transpose(2, 3).reshape(keys.shape))
    return out


def misfit(pages: Tensor, layout: str, kind: str, *, tiles: bool = False) -> str | None:
    """Why `pages` and the layout called `layout` do not serve an op for caches of one kind; None if
    they do. For the `invalid` of ops; `tiles` of those that some implementation serves in tile
    order."""
    try:
        known = KVLayout.parse(layout)
    except ConfigError as error:
        return str(error)
    if known.kind != kind:
        return f"layout {layout} holds {known.kind} records; this op takes {kind} records"
    if known.order == "tile" and not tiles:
        return (
            f"layout {layout} keeps keys in squares, which this op does not take;"
            f" dsa_hal.ops.layout.convert makes it {known.rows.spec}"
        )
    return known.why_not(pages)


def convert(pages: Tensor, source: str, target: str, *, pow2: bool = True) -> Tensor:
    """A new pool in layout `target` with the contents of `pages`, which is in layout `source`.

    Both layouts must be of one kind and hold the same sizes, else ConfigError. Exact where the
    target can hold the source's values: from floats into fp32, from FP8 with power-of-two scales
    into fp32 and bf16, and from there back (the same values; a code and its scale may both move by
    a power of two). Into tile order and out of it bytes move and nothing else. Otherwise values are
    rounded once. A few pages at a time exist as fp32.

    pow2  scales of an FP8 target are powers of two
    """
    old, new = KVLayout.parse(source), KVLayout.parse(target)
    if (old.kind, [p.count for p in old.data]) != (new.kind, [p.count for p in new.data]):
        raise ConfigError(f"{source} cannot become {target}; kind and sizes must be the same")
    if old.order == "tile":
        flat = untiled(pages, old)
        return flat if new == old.rows else convert(flat, old.rows.spec, target, pow2=pow2)
    if new.order == "tile":
        flat = pages if old == new.rows else convert(pages, source, new.rows.spec, pow2=pow2)
        return tiled(flat, new)
    out = new.empty(pages.shape[0], pages.shape[1], pages.device)
    read, write = old.views(pages), new.views(out)
    step = max(1, (1 << 22) // max(1, pages.shape[1] * old.width))
    for at in range(0, pages.shape[0], step):
        some = slice(at, at + step)
        values = old.decode({name: part[some] for name, part in read.items()})
        for name, part in new.encode(values, pow2=pow2).items():
            write[name][some] = part
    return out
