"""The model: blocks over a residual stream, prefill in chunks, decode, logits in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike

import torch
from torch import Tensor

from dsa_hal.errors import BadInput, ConfigError
from dsa_hal.model.attention import Attention, AttentionOps
from dsa_hal.model.batch import (
    Form,
    Piece,
    Step,
    decode_step,
    pieces,
    prefill_step,
    varlen_prefill,
)
from dsa_hal.model.binding import Binder, meta
from dsa_hal.model.cache import Context, KVCache
from dsa_hal.model.checkpoint import Checkpoint
from dsa_hal.model.layers import RopeTable
from dsa_hal.model.moe import Moe, mlp
from dsa_hal.model.precision import Precision, resolve
from dsa_hal.model.weights import Loader, Progress
from dsa_hal.ops.norm import add_rms_norm, rms_norm
from dsa_hal.selection import current

PREFILL_CHUNK = 1024
"""Prompt tokens per step unless said otherwise: enough to fill products, little enough that
activations stay small beside the caches."""


class Block:
    """One layer: norm, attention, norm, feed-forward. The first norm is the caller's."""

    def __init__(self, load: Loader, ops: AttentionOps, layer: int) -> None:
        c, at = load.checkpoint.config, f"model.layers.{layer}."
        self.attention_norm = load.plain(at + "input_layernorm.weight")
        self.attention = Attention(load, ops, layer)
        self.feed_forward_norm = load.plain(at + "post_attention_layernorm.weight")
        self.feed_forward = Moe(load, layer) if c.is_moe(layer) else mlp(load, layer)
        x, self._eps = meta(2, c.hidden_size, dtype=load.formats.activations), c.rms_norm_eps
        self._add_norm = load.bind(add_rms_norm, x, x, self.feed_forward_norm, eps=self._eps)

    def __call__(
        self, x: Tensor, residual: Tensor, step: Step, table: Tensor, latents: Tensor,
        keys: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x [tokens, hidden] after the first norm and the residual stream before it -> what the
        feed-forward adds to the stream, and the stream without it. The rest as in `Attention`."""
        x = self.attention(x, step, table, latents, keys)
        x, residual = self._add_norm(x, residual, self.feed_forward_norm, eps=self._eps)
        return self.feed_forward(x), residual


class Transformer:
    """A DeepSeek-V3.2 model on one device.

    config       the checkpoint's
    formats      number formats of weights, activations and caches; prints as one line
    served       op -> label of the implementation chosen for it
    notes        sentences about what the checkpoint holds and this model leaves out
    max_context  tokens a request may have, prompt and continuation together
    form         "mha" or "mqa" overrides the rule that picks a prefill step's form of attention;
                 both are over gathered contexts, also where attention over pages serves otherwise
    record       generation replays recorded decode steps where the device can record them
    attention_ops  the ops that all layers share; `quality` measures what others in their place do
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device | str | None = None,
        precision: Precision | str | None = None,
        progress: Progress | None = None,
        max_context: int | None = None,
    ) -> None:
        c = self.config = checkpoint.config
        self.max_context = _limit(max_context, c.max_position_embeddings)
        self.formats = resolve(precision, c, checkpoint.weights_dtype, current().limits)
        self.device = torch.device(device or current().device)
        self.notes = checkpoint.notes()
        self.form: Form | None = None
        self.record = True
        bind = Binder()
        load = Loader(checkpoint, self.formats, bind, self.device, progress)
        self.served = bind.served
        self.rope = RopeTable(c, self.device)
        self.embedding = load.plain("model.embed_tokens.weight", self.formats.activations)
        self.attention_ops = AttentionOps(bind, c, self.formats)
        layers = range(c.num_hidden_layers)
        self.blocks = [Block(load, self.attention_ops, layer) for layer in layers]
        self.norm = load.plain("model.norm.weight")
        self.head = load.exact("lm_head.weight")
        x = meta(2, c.hidden_size, dtype=self.formats.activations)
        self._first_norm = bind(rms_norm, x, self.norm, eps=c.rms_norm_eps)
        self._add_norm = bind(add_rms_norm, x, x, self.norm, eps=c.rms_norm_eps)

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        device: torch.device | str | None = None,
        precision: Precision | str | None = None,
        *,
        progress: Progress | None = None,
        max_context: int | None = None,
        check_finite: bool = False,
    ) -> Transformer:
        """Load a checkpoint folder, Hugging Face's format or the demo's.

        device        None = the device of the backend in force
        precision     None follows the checkpoint; "fp8", "bf16", "fp32", or a `Precision`
        progress      called as (tensors read, tensors in all)
        max_context   a limit below the config's max_position_embeddings
        check_finite  read all weights first and refuse NaN and infinity
        """
        with Checkpoint.open(str(path)) as checkpoint:
            if check_finite:
                checkpoint.check_finite()
            return cls(
                checkpoint, device=device, precision=precision, progress=progress,
                max_context=max_context,
            )  # fmt: skip

    def __call__(self, token_ids: Tensor, lengths: Sequence[int] | Tensor | None = None) -> Tensor:
        """Logits [batch, tokens, vocab] fp32 for token ids [batch, tokens], in a cache of its own.

        lengths  [batch], how many tokens of each row count; the logits of the others are zero
        """
        if not isinstance(token_ids, Tensor):
            raise BadInput(f"token ids are a {type(token_ids).__name__}; expected a tensor")
        if token_ids.dim() != 2 or token_ids.is_floating_point():
            raise BadInput(
                f"token ids are {token_ids.dtype} {list(token_ids.shape)}; expected integers"
                " [batch, tokens]"
            )
        batch, width = token_ids.shape
        counts = [int(n) for n in lengths] if lengths is not None else [width] * batch
        if len(counts) != batch or any(not 0 < n <= width for n in counts):
            raise BadInput(f"lengths are {counts}; expected {batch} numbers from 1 to {width}")
        prompts = [self.checked(row[:n]) for row, n in zip(token_ids, counts, strict=True)]
        out = torch.zeros(batch, width, self.config.vocab_size, device=self.device)
        if not batch:
            return out
        cache, contexts = self.new_cache(counts)
        for step, logits in self.prefill(cache, contexts, prompts, every=True):
            at = 0
            for piece in step:
                count = piece.stop - piece.start
                out[piece.request, piece.start : piece.stop] = logits[at : at + count]
                at += count
        return out

    def new_cache(self, lengths: Sequence[int]) -> tuple[KVCache, list[Context]]:
        """A cache with room for requests of up to `lengths` tokens, and their empty contexts."""
        f, layers = self.formats, self.config.num_hidden_layers
        pages = sum(-(-length // f.page_size) for length in lengths)
        cache = KVCache(layers, f.latent, f.index, pages, f.page_size, self.device)
        return cache, [Context() for _ in lengths]

    def checked(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """A prompt as int64 [tokens] on the CPU; BadInput if it is empty, longer than
        `max_context`, or holds an id outside the vocabulary."""
        prompt = torch.as_tensor(tokens, dtype=torch.int64, device="cpu")
        if not 0 < prompt.numel() <= self.max_context:
            raise BadInput(
                f"a prompt has {prompt.numel()} tokens; this model takes 1 to {self.max_context}"
            )
        wrong = prompt[(prompt < 0) | (prompt >= self.config.vocab_size)]
        if wrong.numel():
            raise BadInput(
                f"token id {int(wrong[0])} is outside the vocabulary of {self.config.vocab_size}"
            )
        return prompt

    def prefill(
        self,
        cache: KVCache,
        contexts: Sequence[Context],
        prompts: Sequence[Tensor],
        *,
        chunk: int = PREFILL_CHUNK,
        every: bool = False,
    ) -> Iterator[tuple[list[Piece], Tensor]]:
        """Store prompts (int64 [tokens], from `checked`) behind what their contexts already hold of
        them, step by step; a step has at most `chunk` tokens, of one prompt or several.

        Yields the step's pieces and logits fp32 [rows, vocab]: a row per piece that ends its
        prompt, or, with `every`, a row per token.
        """
        if chunk < 1:
            raise BadInput(f"prefill chunk is {chunk}; it must be at least 1 token")
        starts = [context.length for context in contexts]
        for step in pieces([len(prompt) for prompt in prompts], starts, chunk):
            batch = self._prefill_step(cache, contexts, step, prompts)
            rows = None if every else _last_rows(step, self.device)
            logits = self.forward(batch, cache, rows)
            for piece in step:
                contexts[piece.request].length = piece.stop
            yield step, logits

    def _prefill_step(
        self,
        cache: KVCache,
        contexts: Sequence[Context],
        step: Sequence[Piece],
        prompts: Sequence[Tensor],
    ) -> Step:
        ops = self.attention_ops
        if ops.varlen and self.form is None:
            return varlen_prefill(self.config, cache, contexts, step, prompts)
        return prefill_step(
            self.config, cache, contexts, step, prompts, self.form, free_masks=ops.free_masks
        )

    def decode(self, cache: KVCache, contexts: Sequence[Context], tokens: Tensor) -> Tensor:
        """Append `tokens` [requests, per_request] int64 to each context: logits fp32 [requests,
        per_request, vocab]."""
        varlen = self.attention_ops.varlen
        logits = self.forward(
            decode_step(self.config, cache, contexts, tokens, varlen=varlen), cache
        )
        for context in contexts:
            context.length += tokens.shape[1]
        return logits.view(*tokens.shape, -1)

    @torch.inference_mode()
    def forward(self, step: Step, cache: KVCache, rows: Tensor | None = None) -> Tensor:
        """One step through all layers: logits fp32 [rows, vocab] of the tokens in `rows`, of all if
        None."""
        eps, table = self.config.rms_norm_eps, self.rope.upto(step.positions_end)
        residual = torch.nn.functional.embedding(step.tokens, self.embedding)
        x = self._first_norm(residual, self.blocks[0].attention_norm, eps=eps)
        for layer, block in enumerate(self.blocks):
            if layer:
                x, residual = self._add_norm(x, residual, block.attention_norm, eps=eps)
            x, residual = block(x, residual, step, table, cache.latent[layer], cache.index[layer])
        if rows is not None:
            x, residual = x[rows], residual[rows]
        x, _ = self._add_norm(x, residual, self.norm, eps=eps)
        return self.head(x.float())


def _last_rows(step: Sequence[Piece], device: torch.device) -> Tensor:
    """Rows, among a step's tokens, of the last token of each prompt that ends in it."""
    rows, at = [], 0
    for piece in step:
        at += piece.stop - piece.start
        if piece.last:
            rows.append(at - 1)
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _limit(wish: int | None, most: int) -> int:
    if wish is None:
        return most
    if not 0 < wish <= most:
        raise ConfigError(f"max_context is {wish}; this model's positions allow 1 to {most}")
    return wish
