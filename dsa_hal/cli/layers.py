"""One layer of a model on the clock: what each of its ops takes, with sparse attention and without.

On devices that record work the layer is recorded and replayed, so that the host's own time does not
count; time stamps between the ops are part of the recording. The last-level cache is cold.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from dsa_hal.cli import output
from dsa_hal.errors import DsaHalError
from dsa_hal.graphs import Recorded, can_record
from dsa_hal.measure import FLUSH, last_level_cache
from dsa_hal.model.attention import AttentionOps
from dsa_hal.model.batch import Piece, Step, decode_batch, prefill_step, varlen_prefill
from dsa_hal.model.binding import Binder, meta
from dsa_hal.model.cache import Context, KVCache
from dsa_hal.model.dense import DenseAttention
from dsa_hal.model.layers import RopeTable
from dsa_hal.model.precision import Formats, Precision, resolve
from dsa_hal.model.transformer import Block
from dsa_hal.model.weights import Loader, Progress, Source
from dsa_hal.ops.cache import store_index_key, store_latent
from dsa_hal.ops.layout import KVLayout
from dsa_hal.ops.norm import add_rms_norm
from dsa_hal.registry import Op
from dsa_hal.selection import current

P = ParamSpec("P")
R = TypeVar("R")

Kind = Literal["dsa", "dense"]
Phase = Literal["prefill", "decode"]

REPEATS, FEW = 9, 3
"""Runs of a layer on an accelerator, and on a processor, where each takes long."""

AHEAD = 16
"""Times that an accelerator's cache is written over: the host needs about 2 ms for a layer."""

FILL = 1 << 17
"""Tokens of a cache that are filled with random content of their own; the rest repeats them."""


@dataclass(frozen=True)
class Work:
    """What a layer is asked: the last `tokens` of one prompt of `context` tokens, or one new token
    for each of `tokens` requests that have `context` tokens then."""

    phase: Phase
    tokens: int
    context: int

    def __str__(self) -> str:
        if self.phase == "prefill":
            return f"prefill {self.tokens} of {self.context}"
        return f"decode {self.tokens} x {self.context}"


@dataclass(frozen=True)
class Measured:
    """Seconds of one layer at some work, medians.

    whole         the layer, without stamps between its ops
    attend        what attention itself takes, projections of the layer's input and output apart:
                  with DSA the indexer, its cache and the selection are part of it
    attention     all of attention, with projections, and the norm before it
    feed_forward  the experts or the MLP
    ops           label -> seconds of all its calls, in the order of the first; what `stamped` has
                  beyond them are torch's own small steps between
    stamped       the layer with the stamps
    recorded      whether the work was replayed, and not launched by the host
    """

    kind: Kind
    work: Work
    whole: float
    attend: float
    attention: float
    feed_forward: float
    ops: dict[str, float]
    stamped: float
    recorded: bool


class Clock:
    """Stamps around the ops that `ClockedBinder` bound, while it runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stamp: Callable[[], Any] | None = None
        self.marks: list[tuple[str, Any, Any]] = []
        self.begin: Any = None
        self.end: Any = None

    @contextmanager
    def running(self, *, recording: bool) -> Iterator[None]:
        """Inside the block stamps are made; those of the last block are forgotten."""
        device = self._device
        if device.type == "cpu":
            make: Callable[[], Any] = time.perf_counter
        else:
            module = torch.get_device_module(device)
            external = {"external": True} if recording else {}

            def make() -> Any:
                event = module.Event(enable_timing=True, **external)
                event.record()
                return event

        self.marks, self._stamp = [], make
        self.begin = make()
        try:
            yield
            self.end = make()
        finally:
            self._stamp = None

    def call(self, label: str, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        if self._stamp is None:
            return fn(*args, **kwargs)
        begin = self._stamp()
        result = fn(*args, **kwargs)
        if label == "linear":
            label = f"linear {args[0].shape[-1]} -> {result.shape[-1]}"  # type: ignore[attr-defined]
        self.marks.append((label, begin, self._stamp()))
        return result

    def between(self, begin: Any, end: Any) -> float:
        """Seconds between two stamps, once the device has passed both."""
        if isinstance(begin, float):
            return float(end - begin)
        return float(begin.elapsed_time(end)) / 1e3  # events count milliseconds


class ClockedBinder(Binder):
    """Binds ops so that a clock can stamp their calls."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def __call__(self, op: Op[P, R], *args: P.args, **kwargs: P.kwargs) -> Callable[P, R]:
        bound = super().__call__(op, *args, **kwargs)

        def clocked(*args: P.args, **kwargs: P.kwargs) -> R:
            return self._clock.call(op.name, bound, *args, **kwargs)

        return clocked


class Layer:
    """One layer in either form, with caches of random content.

    source  where its weights come from
    layer   its number
    tokens  room in the caches
    served  op -> label of the implementation that serves it
    """

    def __init__(
        self,
        source: Source,
        layer: int,
        device: torch.device,
        *,
        tokens: int,
        precision: Precision | str | None = None,
        progress: Progress | None = None,
    ) -> None:
        c = self.config = source.config
        self.device, self.clock = device, Clock(device)
        bind = ClockedBinder(self.clock)
        self.served = bind.served
        self.formats = resolve(precision, c, source.weights_dtype, current().limits)
        load = Loader(source, self.formats, bind, device, progress)
        ops = AttentionOps(bind, c, self.formats)
        self._free_masks, self._varlen = ops.free_masks, ops.varlen
        self._block = Block(load, ops, layer)
        self._own = self._block.attention
        plain = "fp32" if self.formats.activations == torch.float32 else "bf16"
        latent = KVLayout.parse(f"latent_{plain}/{c.kv_lora_rank}+{c.qk_rope_head_dim}")
        self._plain = replace(self.formats, latent=latent)
        load = Loader(source, self._plain, bind, device)
        self._dense = DenseAttention(load, AttentionOps(bind, c, self._plain), layer)
        x = meta(2, c.hidden_size, dtype=self.formats.activations)
        self._norm = bind(add_rms_norm, x, x, self._block.attention_norm, eps=c.rms_norm_eps)
        self._rope = RopeTable(c, device)
        pages = -(-tokens // self.formats.page_size)
        self._caches = {
            "dsa": _filled(self.formats, pages, device, True),
            "dense": _filled(self._plain, pages, device, False),
        }
        self._flush = torch.zeros(
            FLUSH * last_level_cache(device), dtype=torch.uint8, device=device
        )

    def measure(self, kind: Kind, work: Work, repeats: int | None = None) -> Measured:
        """The layer's times at some work."""
        repeats = repeats or (FEW if self.device.type == "cpu" else REPEATS)
        with torch.inference_mode():
            run = self._prepared(kind, work)
            for _ in range(2):  # compiles what is compiled at first use
                run()
            recorded = can_record(self.device)
            try:
                replay = self._replayed(run, stamped=True) if recorded else run
            except DsaHalError as refusal:
                output.note(f"{kind}, {work}: launched by the host: {refusal}")
                recorded, replay = False, run
            samples = [self._sample(replay, recorded) for _ in range(repeats)]
            replay = self._replayed(run, stamped=False) if recorded else run
            whole = self._timed(replay, repeats)
        ops: dict[str, list[float]] = {}
        for at, (label, _, _) in enumerate(self.clock.marks):
            ops.setdefault(label, []).append(statistics.median(s.ops[at] for s in samples))
        parts = (statistics.median(part) for part in zip(*(s.parts for s in samples), strict=True))
        attend, attention, feed_forward, stamped = parts
        return Measured(
            kind, work, whole, attend, attention, feed_forward,
            {label: sum(times) for label, times in ops.items()}, stamped, recorded,
        )  # fmt: skip

    # -- the work ------------------------------------------------------------------------------

    def _prepared(self, kind: Kind, work: Work) -> Callable[[], object]:
        """The layer's call at this work, on tensors that stay."""
        c, cache, block = self.config, self._caches[kind], self._block
        step = self._step(cache, work, varlen=self._varlen and kind == "dsa")
        generator = torch.Generator(self.device).manual_seed(0)
        x, residual = (
            torch.randn(
                work.tokens, c.hidden_size, dtype=self.formats.activations, device=self.device,
                generator=generator,
            )
            for _ in range(2)
        )  # fmt: skip
        table = self._rope.upto(work.context)

        def run() -> object:
            block.attention = self._own if kind == "dsa" else self._dense
            normed, stream = self._norm(x, residual, block.attention_norm, eps=c.rms_norm_eps)
            return block(normed, stream, step, table, cache.latent[0], cache.index[0])

        return run

    def _step(self, cache: KVCache, work: Work, *, varlen: bool) -> Step:
        pages = -(-work.context // cache.page_size)
        if work.phase == "prefill":
            context = Context(work.context - work.tokens, list(range(pages)))
            piece = Piece(0, context.length, work.context, True)
            prompt = torch.zeros(work.context, dtype=torch.int64)
            if varlen:
                return varlen_prefill(self.config, cache, [context], [piece], [prompt])
            return prefill_step(
                self.config, cache, [context], [piece], [prompt], free_masks=self._free_masks
            )
        first = torch.arange(work.tokens, dtype=torch.int32, device=self.device)[:, None] * pages
        table = first + torch.arange(pages, dtype=torch.int32, device=self.device)
        tokens = torch.zeros(work.tokens, 1, dtype=torch.int64, device=self.device)
        lengths = torch.full((work.tokens,), work.context - 1, dtype=torch.int32)
        return decode_batch(
            self.config, tokens, lengths.to(self.device), table, longest=work.context,
            page_size=cache.page_size, varlen=varlen,
        )  # fmt: skip

    # -- timing --------------------------------------------------------------------------------

    def _replayed(self, run: Callable[[], object], *, stamped: bool) -> Callable[[], object]:
        def stamping() -> object:
            with self.clock.running(recording=True):
                return run()

        return Recorded(stamping if stamped else run, self.device).replay

    def _timed(self, run: Callable[[], object], repeats: int) -> float:
        """The median of calls with cold caches."""
        outer, samples = Clock(self.device), []
        for _ in range(repeats):
            self._cool()
            with outer.running(recording=False):
                run()
            self._wait()
            samples.append(outer.between(outer.begin, outer.end))
        return statistics.median(samples)

    def _sample(self, run: Callable[[], object], recorded: bool) -> _Sample:
        self._cool()
        if recorded:
            run()
        else:
            with self.clock.running(recording=False):
                run()
        self._wait()
        return _Sample.of(self.clock)

    def _cool(self) -> None:
        """Empty the caches, which also keeps the device busy while the host launches the layer."""
        for _ in range(1 if self.device.type == "cpu" else AHEAD):
            self._flush.add_(1)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)


@dataclass(frozen=True)
class _Sample:
    """One run's seconds: of each op's call, and of the parts as in `Measured`."""

    ops: list[float]
    parts: tuple[float, float, float, float]

    @classmethod
    def of(cls, clock: Clock) -> _Sample:
        marks = clock.marks
        norms = [at for at, (label, _, _) in enumerate(marks) if label == "add_rms_norm"]
        before, after = marks[norms[0]], marks[norms[1]]
        labels = [label for label, _, _ in marks[: norms[1]]]
        rotated = marks[labels.index("rope")]
        stored = marks[labels.index("store_latent")]
        out = marks[norms[1] - 1]  # the projection behind attention
        between = clock.between
        attend = between(rotated[2], out[1]) - between(stored[1], stored[2])
        return cls(
            [between(begin, end) for _, begin, end in marks],
            (
                attend,
                between(before[1], after[1]),
                between(after[2], clock.end),
                between(clock.begin, clock.end),
            ),
        )


def _filled(formats: Formats, pages: int, device: torch.device, indexed: bool) -> KVCache:
    """A cache of one layer whose pages hold random latents, and random index keys if it is
    `indexed`."""
    size = formats.page_size
    cache = KVCache(1, formats.latent, formats.index, pages, size, device)
    tokens = min(FILL, pages * size)
    slots = torch.arange(tokens, dtype=torch.int32, device=device)
    generator = torch.Generator(device).manual_seed(1)

    def random(width: int) -> Tensor:
        made = torch.randn(tokens, width, device=device, generator=generator)
        return made.to(formats.activations)

    latent, index = formats.latent, formats.index
    store_latent(cache.latent[0], random(latent.width), slots, layout=latent.spec)
    pools = [latent.views(cache.latent[0])]
    if indexed:
        keys = random(index.width)
        store_index_key(cache.index[0], keys, slots, layout=index.spec, pow2=formats.pow2)
        pools.append(index.views(cache.index[0]))
    for view in (view for pool in pools for view in pool.values()):
        for at in range(tokens // size, pages, tokens // size):
            part = view[at : at + tokens // size]
            part.copy_(view[: len(part)])
    return cache


def works(
    contexts: Sequence[int], *, prefill: Sequence[int] = (), decode: Sequence[int] = ()
) -> list[Work]:
    """Prefill of so many tokens, and decode of so many requests, at each context that has room."""
    asked: tuple[tuple[Phase, Sequence[int]], ...] = (("prefill", prefill), ("decode", decode))
    return [
        Work(phase, tokens, context)
        for phase, sizes in asked
        for tokens in sizes
        for context in contexts
        if phase == "decode" or tokens <= context
    ]
