"""One attention layer: latents and index keys into the cache, selection, and MLA in two forms; or
in one, over the pages of all requests, where the device has ops for that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsa_hal.model.batch import Decode, Prefill, Step, Varlen
from dsa_hal.model.binding import Binder, ints, meta
from dsa_hal.model.config import ModelConfig
from dsa_hal.model.layers import Linear
from dsa_hal.model.precision import Formats
from dsa_hal.model.weights import Loader
from dsa_hal.ops.absorbed import mla_attention
from dsa_hal.ops.cache import gather_index_key, gather_latent, store_index_key, store_latent
from dsa_hal.ops.dense import FREE_MASK, mha_prefill
from dsa_hal.ops.fused import indexer_qk, latent_qkv
from dsa_hal.ops.index_select import indexer_topk, indexer_topk_paged
from dsa_hal.ops.norm import rope
from dsa_hal.ops.select import to_slots
from dsa_hal.ops.varlen import VARLEN, indexer_topk_varlen, mla_attention_varlen

LATENT_EPS = 1e-6
"""Of the norms of the two low-rank activations; a constant, unlike the blocks' `rms_norm_eps`."""


class AttentionOps:
    """The ops of attention, bound once for all layers, which have the same shapes.

    varlen      selection and attention read the pages of all requests in one call each. The ops of
                the other ways are bound when they are first called then, which `form` asks for
    free_masks  expanded MHA takes no longer under a selection than without one
    """

    def __init__(self, bind: Binder, c: ModelConfig, f: Formats) -> None:
        x, page = f.activations, f.page_size
        lora, rot, heads = c.kv_lora_rank, c.qk_rope_head_dim, c.num_attention_heads
        dim, count, topk = c.index_head_dim, c.index_n_heads, c.index_topk
        table, q = meta(8, rot), meta(2, heads, c.qk_head_dim, dtype=x)
        latents, keys = f.latent.empty(1, page, "meta"), f.index.empty(1, page, "meta")
        q_index = meta(2, count, dim, dtype=f.index.data[0].dtype)
        key = meta(8, dim, dtype=f.index.data[0].dtype)
        weights, k = meta(2, count), meta(2, dim, dtype=x)
        scale, latent_spec, index_spec = c.softmax_scale, f.latent.spec, f.index.spec

        self.latent_qkv = bind(
            latent_qkv, meta(2, c.q_lora_rank, dtype=x), meta(2, lora + rot, dtype=x),
            meta(c.q_lora_rank), meta(lora), ints(2), table, eps=LATENT_EPS,
        )  # fmt: skip
        self.rope = bind(rope, q, ints(2), table, interleaved=True, offset=c.qk_nope_head_dim)
        self.indexer_qk = bind(
            indexer_qk, meta(2, count * dim, dtype=x), k, weights, meta(dim), meta(dim), ints(2),
            table, interleaved=c.indexer_rope_interleave, quantize=f.quantize_index, pow2=f.pow2,
        )  # fmt: skip
        self.store_latent = bind(
            store_latent, latents, meta(2, lora + rot, dtype=x), ints(2), layout=latent_spec
        )
        self.store_index_key = bind(
            store_index_key, keys, k, ints(2), layout=index_spec, pow2=f.pow2
        )
        chosen = (q_index, keys, weights, *_requests(), topk)
        at: dict[str, Any] = dict(layout=index_spec, max_context_len=page)
        self.varlen = all(
            VARLEN in promises
            for promises in (
                indexer_topk_varlen.select(*chosen, **at).promises,
                mla_attention_varlen.select(
                    *_absorbed(c, f, meta(heads, _kv_width(c), lora, dtype=x)), *_requests(),
                    softmax_scale=scale, layout=latent_spec,
                ).promises,
            )
        )  # fmt: skip
        if self.varlen:
            self.indexer_topk_varlen = bind(indexer_topk_varlen, *chosen, **at)

        other = bind.later if self.varlen else bind.__call__
        self.gather_latent = other(gather_latent, latents, ints(8), layout=latent_spec, out_dtype=x)
        self.gather_index_key = other(gather_index_key, keys, ints(8), layout=index_spec)
        self.indexer_topk = other(
            indexer_topk, q_index, key, meta(8), weights, ints(2), ints(2), topk
        )
        self.indexer_topk_paged = other(
            indexer_topk_paged, q_index[:, None], keys, weights, ints(2, 1), ints(2, 1), topk,
            layout=index_spec, max_context_len=page,
        )  # fmt: skip
        self.to_slots = other(to_slots, ints(2, topk), ints(2, 1), 1, page_size=page)
        per_head = (
            q, meta(8, heads, c.qk_head_dim, dtype=x), meta(8, heads, c.v_head_dim, dtype=x),
            ints(2), ints(2), ints(2, topk),
        )  # fmt: skip
        self.mha_prefill = other(mha_prefill, *per_head, softmax_scale=scale)
        self.free_masks = not self.varlen and (
            FREE_MASK in mha_prefill.select(*per_head, softmax_scale=scale).promises
        )


class Attention:
    """One layer's attention."""

    def __init__(self, load: Loader, ops: AttentionOps, layer: int) -> None:
        c = load.checkpoint.config
        at = f"model.layers.{layer}.self_attn."
        self.config, self.formats, self.ops = c, load.formats, ops
        self.down = load.linears(at + "q_a_proj", at + "indexer.wk", at + "kv_a_proj_with_mqa")
        self.up = load.linears(at + "q_b_proj", at + "indexer.wq_b")
        self.out = load.linears(at + "o_proj")
        self.weights_proj = load.exact(at + "indexer.weights_proj.weight")
        self.q_norm = load.plain(at + "q_a_layernorm.weight")
        self.kv_norm = load.plain(at + "kv_a_layernorm.weight")
        self.k_norm = load.plain(at + "indexer.k_norm.weight")
        self.k_norm_bias = load.plain(at + "indexer.k_norm.bias")
        # One multiplied-out copy serves both forms of attention. Latents that went through the FP8
        # cache would survive another rounding unchanged, so expanding them needs none.
        kv_b, packed = load.multiplied_out(at + "kv_b_proj")
        self.kv_b = kv_b.view(c.num_attention_heads, _kv_width(c), c.kv_lora_rank)
        self.expand = Linear(load.bind, packed, c.kv_lora_rank, load.formats.activations)
        self._bind_mla(load.bind)

    def _bind_mla(self, bind: Binder) -> None:
        """The absorbed form over gathered rows, and over pages by slots and by positions."""
        c, f = self.config, self.formats
        q, kv_b, pages, chosen = _absorbed(c, f, self.kv_b)
        rows, scale = meta(8, f.latent.width, dtype=f.activations), c.softmax_scale
        other = bind.later if self.ops.varlen else bind.__call__
        if self.ops.varlen:
            self._mla_varlen = bind(
                mla_attention_varlen, q, kv_b, pages, chosen, *_requests(), softmax_scale=scale,
                layout=f.latent.spec,
            )  # fmt: skip
        self._mla = other(mla_attention, q, kv_b, rows, chosen, softmax_scale=scale)
        self._mla_paged = other(
            mla_attention, q, kv_b, pages, chosen, softmax_scale=scale, layout=f.latent.spec
        )

    def __call__(
        self, x: Tensor, step: Step, table: Tensor, latents: Tensor, keys: Tensor
    ) -> Tensor:
        """x [tokens, hidden] after its norm -> [tokens, hidden].

        Writes the new tokens' latents and index keys to the pools `latents` and `keys` of this
        layer, also where nothing needs to be selected yet: later tokens will select among them.
        `table` is the rotary table.
        """
        c, f, ops = self.config, self.formats, self.ops
        tokens = x.shape[0]
        q_a, k_index, kv_a = self.down(x)
        qr, latent = ops.latent_qkv(
            q_a, kv_a, self.q_norm, self.kv_norm, step.positions, table, eps=LATENT_EPS
        )
        q, q_index = self.up(qr)
        q = ops.rope(
            q.view(tokens, c.num_attention_heads, c.qk_head_dim), step.positions, table,
            interleaved=True, offset=c.qk_nope_head_dim,
        )  # fmt: skip
        q_index, k_index, weights = ops.indexer_qk(
            q_index, k_index, self.weights_proj(x.float()), self.k_norm, self.k_norm_bias,
            step.positions, table,
            interleaved=c.indexer_rope_interleave, quantize=f.quantize_index, pow2=f.pow2,
        )  # fmt: skip
        ops.store_latent(latents, latent, step.slots, layout=f.latent.spec)
        ops.store_index_key(keys, k_index, step.slots, layout=f.index.spec, pow2=f.pow2)
        q_index = q_index.to(f.index.data[0].dtype)
        if isinstance(step, Varlen):
            attended = self._any_length(q, q_index, weights, step, latents, keys)
        elif isinstance(step, Prefill):
            attended = self._prefill(q, q_index, weights, step, latents, keys)
        else:
            attended = self._decode(q, q_index, weights, step, latents, keys)
        return self.out(attended.reshape(tokens, -1))[0]

    def _prefill(
        self,
        q: Tensor,
        q_index: Tensor,
        weights: Tensor,
        step: Prefill,
        latents: Tensor,
        keys: Tensor,
    ) -> Tensor:
        """Attention over the gathered contexts of the step's requests, in the form of the step."""
        c, f, ops = self.config, self.formats, self.ops
        indices = step.everything
        if step.scored:
            key, key_scale = ops.gather_index_key(keys, step.gathered, layout=f.index.spec)
            indices = ops.indexer_topk(
                q_index, key, key_scale, weights, step.ks, step.ke, c.index_topk
            )
        latent = ops.gather_latent(
            latents, step.gathered, layout=f.latent.spec, out_dtype=f.activations
        )
        if step.form == "mqa":
            assert indices is not None
            return self._mla(q, self.kv_b, latent, indices, softmax_scale=c.softmax_scale)
        k, v = self._expanded(latent)
        return ops.mha_prefill(q, k, v, step.ks, step.ke, indices, softmax_scale=c.softmax_scale)[0]

    def _expanded(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [context, lora + rope] -> keys [context, heads, nope + rope] and values
        [context, heads, v]. The rotated part is one head's, repeated."""
        c = self.config
        heads, nope = c.num_attention_heads, c.qk_nope_head_dim
        kv = self.expand(latent[:, : c.kv_lora_rank]).view(-1, heads, _kv_width(c))
        rotated = latent[:, None, c.kv_lora_rank :].expand(-1, heads, -1)
        return torch.cat([kv[..., :nope], rotated], -1), kv[..., nope:]

    def _decode(
        self,
        q: Tensor,
        q_index: Tensor,
        weights: Tensor,
        step: Decode,
        latents: Tensor,
        keys: Tensor,
    ) -> Tensor:
        """Absorbed attention that reads the pools in place."""
        c, f, ops = self.config, self.formats, self.ops
        slots = step.everything
        if slots is None:
            requests, count = step.context_lens.shape
            chosen = ops.indexer_topk_paged(
                q_index.view(requests, count, c.index_n_heads, c.index_head_dim), keys, weights,
                step.context_lens, step.block_table, c.index_topk,
                layout=f.index.spec, max_context_len=step.longest,
            )  # fmt: skip
            slots = ops.to_slots(chosen, step.block_table, count, page_size=f.page_size)
        return self._mla_paged(
            q, self.kv_b, latents, slots, softmax_scale=c.softmax_scale, layout=f.latent.spec
        )

    def _any_length(
        self,
        q: Tensor,
        q_index: Tensor,
        weights: Tensor,
        step: Varlen,
        latents: Tensor,
        keys: Tensor,
    ) -> Tensor:
        """Absorbed attention over the pages of all requests, in either phase."""
        c, f = self.config, self.formats
        requests = step.cu_seqlens_q, step.context_lens, step.block_table
        positions = step.everything
        if positions is None:
            positions = self.ops.indexer_topk_varlen(
                q_index, keys, weights, *requests, c.index_topk, layout=f.index.spec,
                max_context_len=step.longest,
            )  # fmt: skip
        return self._mla_varlen(
            q, self.kv_b, latents, positions, *requests, softmax_scale=c.softmax_scale,
            layout=f.latent.spec,
        )  # fmt: skip


def _kv_width(c: ModelConfig) -> int:
    """Rows of kv_b_proj per head: [key without position | value]."""
    return c.qk_nope_head_dim + c.v_head_dim


def _requests() -> tuple[Tensor, Tensor, Tensor]:
    """cu_seqlens_q, context_lens and block_table of two requests, on one page each."""
    return ints(3), ints(2), ints(2, 1)


def _absorbed(c: ModelConfig, f: Formats, kv_b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, `kv_b`, pages of latents and choices of keys, of two tokens."""
    q = meta(2, c.num_attention_heads, c.qk_head_dim, dtype=f.activations)
    return q, kv_b, f.latent.empty(1, f.page_size, "meta"), ints(2, c.index_topk)
