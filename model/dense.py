"""A layer's attention without its indexer, over every earlier key: what sparse attention is
measured against. Weights, norms and projections are those of `Attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_hal.model.attention import LATENT_EPS, Attention, AttentionOps
from dsa_hal.model.batch import Decode, Prefill, Step, Varlen
from dsa_hal.model.binding import ints, meta
from dsa_hal.model.weights import Loader
from dsa_hal.ops.dense import dense_mla, mha_prefill


class DenseAttention(Attention):
    """MHA over expanded latents in prefill, the absorbed form in decoding.

    Latents are cached unquantised, and a request's pages stand in ascending order without gaps, so
    that decoding reads them as rows.
    """

    def __init__(self, load: Loader, ops: AttentionOps, layer: int) -> None:
        super().__init__(load, ops, layer)
        c, x = self.config, self.formats.activations
        at, heads = f"model.layers.{layer}.self_attn.", c.num_attention_heads
        self.down = load.linears(at + "q_a_proj", at + "kv_a_proj_with_mqa")
        self.up = load.linears(at + "q_b_proj")
        width = self.formats.latent.width
        self._dense = load.bind(
            dense_mla, meta(2, heads, width, dtype=x), meta(8, width, dtype=x), ints(2), ints(2),
            softmax_scale=c.softmax_scale, dim_v=c.kv_lora_rank,
        )  # fmt: skip
        self._mha = load.bind(
            mha_prefill, meta(2, heads, c.qk_head_dim, dtype=x),
            meta(8, heads, c.qk_head_dim, dtype=x), meta(8, heads, c.v_head_dim, dtype=x), ints(2),
            ints(2), softmax_scale=c.softmax_scale,
        )  # fmt: skip

    def __call__(
        self, x: Tensor, step: Step, table: Tensor, latents: Tensor, keys: Tensor
    ) -> Tensor:
        """As of `Attention`; `keys` is not used, and a step is no `Varlen`."""
        assert not isinstance(step, Varlen)
        c, f, ops = self.config, self.formats, self.ops
        tokens = x.shape[0]
        q_a, kv_a = self.down(x)
        qr, latent = ops.latent_qkv(
            q_a, kv_a, self.q_norm, self.kv_norm, step.positions, table, eps=LATENT_EPS
        )
        q = ops.rope(
            self.up(qr)[0].view(tokens, c.num_attention_heads, c.qk_head_dim), step.positions,
            table, interleaved=True, offset=c.qk_nope_head_dim,
        )  # fmt: skip
        ops.store_latent(latents, latent, step.slots, layout=f.latent.spec)
        if isinstance(step, Prefill):
            attended = self._meet_all(q, step, latents)
        else:
            attended = self._meet_stored(q, step, latents)
        return self.out(attended.reshape(tokens, -1))[0]

    def _meet_all(self, q: Tensor, step: Prefill, latents: Tensor) -> Tensor:
        c, f = self.config, self.formats
        latent = self.ops.gather_latent(
            latents, step.gathered, layout=f.latent.spec, out_dtype=f.activations
        )
        k, v = self._expanded(latent)
        return self._mha(q, k, v, step.ks, step.ke, softmax_scale=c.softmax_scale)[0]

    def _meet_stored(self, q: Tensor, step: Decode, latents: Tensor) -> Tensor:
        c, nope, kind = self.config, self.config.qk_nope_head_dim, self.kv_b.dtype
        into = torch.bmm(q[..., :nope].to(kind).transpose(0, 1), self.kv_b[:, :nope])
        absorbed = torch.cat([into.transpose(0, 1).to(q.dtype), q[..., nope:]], -1)
        rows = latents.view(-1, self.formats.latent.width)
        first = step.block_table[:, :1] * self.formats.page_size
        latent, _ = self._dense(
            absorbed, rows, first.expand(step.context_lens.shape).flatten(),
            (first + step.context_lens).flatten(), softmax_scale=c.softmax_scale,
            dim_v=c.kv_lora_rank,
        )  # fmt: skip
        heads = torch.bmm(latent.transpose(0, 1).to(kind), self.kv_b[:, nope:].transpose(1, 2))
        return heads.transpose(0, 1).to(q.dtype)
