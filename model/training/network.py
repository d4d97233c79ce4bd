"""The model's differentiable twin: the same mathematics over plain torch, for training.

What decides the meaning is shared, not repeated: rotation and routing are the ops' references, the
sparse attention and the indexer's loss are ops with gradients. Parameters are fp32; on a device
with bf16 products the trainer runs the twin under autocast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsa_hal.model.attention import LATENT_EPS
from dsa_hal.model.config import ModelConfig
from dsa_hal.model.layers import RopeTable
from dsa_hal.model.training.focus import held
from dsa_hal.model.training.settings import StageName
from dsa_hal.ops import autograd
from dsa_hal.ops.index_select import indexer_topk
from dsa_hal.ops.norm import rope
from dsa_hal.ops.routing import route


@dataclass
class Rows:
    """A batch as the ops see it: sequences one behind the other.

    positions  [tokens] within the sequence
    ks, ke     [tokens] int32, the rows each token may see
    """

    batch: int
    length: int
    positions: Tensor
    table: Tensor
    ks: Tensor
    ke: Tensor

    @classmethod
    def of(cls, batch: int, length: int, table: Tensor) -> Rows:
        at = torch.arange(batch * length, device=table.device)
        start = at // length * length
        return cls(batch, length, at - start, table, start.int(), (at + 1).int())

    def apart(self, t: Tensor) -> Tensor:
        """[tokens, ...] -> [batch, length, ...]"""
        return t.view(self.batch, self.length, *t.shape[1:])


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which linears compute here: autocast's, else x's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class RmsNorm(nn.Module):
    """Computed in fp32 and rounded once, as the model does between its linears."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = functional.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)
        return normed.to(_product_dtype(x))


class Indexer(nn.Module):
    """Scores of earlier tokens. Its inputs come detached: it learns from its own loss alone."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.config = c
        heads, dim = c.index_n_heads, c.index_head_dim
        self.wq_b = nn.Linear(c.q_lora_rank, heads * dim, bias=False)
        self.wk = nn.Linear(c.hidden_size, dim, bias=False)
        self.k_norm = nn.LayerNorm(dim, eps=1e-6)
        self.weights_proj = nn.Linear(c.hidden_size, heads, bias=False)

    def forward(self, x: Tensor, qr: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """x [tokens, hidden], qr [tokens, q_lora] -> q [tokens, heads, dim], k [tokens, dim] of
        the products' dtype, weights [tokens, heads] fp32 with every constant in them."""
        c = self.config
        q = self.wq_b(qr).view(-1, c.index_n_heads, c.index_head_dim)
        turn = dict(interleaved=c.indexer_rope_interleave)
        q = rope.reference(q, rows.positions, rows.table, **turn)
        k = self.k_norm(self.wk(x).float()).to(q.dtype)
        k = rope.reference(k, rows.positions, rows.table, **turn)
        with torch.autocast(x.device.type, enabled=False):
            weights = functional.linear(x.float(), self.weights_proj.weight)
        return q, k, weights * (c.index_n_heads * c.index_head_dim) ** -0.5


class Attention(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.config = c
        heads, lora = c.num_attention_heads, c.kv_lora_rank
        self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
        self.q_a_layernorm = RmsNorm(c.q_lora_rank, LATENT_EPS)
        self.q_b_proj = nn.Linear(c.q_lora_rank, heads * c.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, lora + c.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RmsNorm(lora, LATENT_EPS)
        self.kv_b_proj = nn.Linear(lora, heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * c.v_head_dim, c.hidden_size, bias=False)
        self.indexer = Indexer(c)

    def forward(self, x: Tensor, rows: Rows, stage: StageName) -> tuple[Tensor, Tensor | None]:
        """x [tokens, hidden] -> out [tokens, hidden], and what the stage wants beside it.

        "dense"   attends to everything and leaves the indexer out; nothing beside
        "focus"   the same; the attention mass that keys have `held`
        "warmup"  the same; the indexer's loss against it, mean over tokens
        "sparse"  attends to what the indexer selects; its loss over that, mean over tokens
        """
        c = self.config
        qr = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(qr).view(-1, c.num_attention_heads, c.qk_head_dim)
        q = rope.reference(
            q, rows.positions, rows.table, interleaved=True, offset=c.qk_nope_head_dim
        )
        kv = self.kv_a_proj_with_mqa(x)
        latent = self.kv_a_layernorm(kv[:, : c.kv_lora_rank])
        rotated = rope.reference(
            kv[:, c.kv_lora_rank :], rows.positions, rows.table, interleaved=True
        )
        if stage == "dense" or stage == "focus":
            k, v = self._expanded(latent, rotated)
            mass = None if stage == "dense" else held(
                rows.apart(q.to(k.dtype)), rows.apart(k), c.index_topk, c.softmax_scale
            )  # fmt: skip
            return self.o_proj(self._dense(q, k, v, rows)), mass
        keys = torch.cat([latent, rotated], -1)
        absorbed = self._absorbed(q)
        q_index, k_index, weights = self.indexer(x.detach(), qr.detach(), rows)
        if stage == "warmup":
            out, chosen = self._dense(q, *self._expanded(latent, rotated), rows), None
        else:
            chosen = self._select(q_index, k_index, weights, rows)
            out = self._sparse(absorbed, keys, chosen)
        loss = autograd.indexer_kl(
            q_index, k_index, weights, absorbed.detach(), keys.detach(),
            ks=rows.ks if chosen is None else None, ke=rows.ke if chosen is None else None,
            indices=chosen, softmax_scale=c.softmax_scale,
        )  # fmt: skip
        return self.o_proj(out), loss / len(x)

    def _expanded(self, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [tokens, heads, nope + rope] and values [tokens, heads, v]."""
        c = self.config
        heads, nope = c.num_attention_heads, c.qk_nope_head_dim
        kv = self.kv_b_proj(latent).view(-1, heads, nope + c.v_head_dim)
        k, v = kv.split([nope, c.v_head_dim], -1)
        return torch.cat([k, rotated[:, None].expand(-1, heads, -1)], -1), v

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """Attention to every earlier token of the sequence: [tokens, heads * v]."""
        q, k, v = (rows.apart(t.to(k.dtype)).transpose(1, 2) for t in (q, k, v))
        scale = self.config.softmax_scale
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    def _halves(self) -> tuple[Tensor, Tensor]:
        """kv_b_proj as [heads, nope, lora] for keys and [heads, v, lora] for values."""
        c = self.config
        weight = self.kv_b_proj.weight.view(c.num_attention_heads, -1, c.kv_lora_rank)
        keys, values = weight.split([c.qk_nope_head_dim, c.v_head_dim], 1)
        return keys, values

    def _absorbed(self, q: Tensor) -> Tensor:
        """q [tokens, heads, nope + rope] -> [tokens, heads, lora + rope]."""
        nope, turned = q.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], -1)
        lifted = torch.einsum("thn,hnc->thc", nope, self._halves()[0])
        return torch.cat([lifted, turned.to(lifted.dtype)], -1)

    @torch.no_grad()
    def _select(self, q: Tensor, k: Tensor, weights: Tensor, rows: Rows) -> Tensor:
        """Rows that each token attends to: [tokens, index_topk] int32, -1 = none. A sequence at a
        time, so that scores are [length, length]."""
        ones = torch.ones(rows.length, device=q.device)
        parts = []
        for at in range(0, rows.batch * rows.length, rows.length):
            some = slice(at, at + rows.length)
            here = indexer_topk(
                q[some], k[some], ones, weights[some], rows.ks[some] - at, rows.ke[some] - at,
                self.config.index_topk,
            )  # fmt: skip
            parts.append(torch.where(here < 0, here, here + at))
        return torch.cat(parts)

    def _sparse(self, q: Tensor, keys: Tensor, chosen: Tensor) -> Tensor:
        c = self.config
        out, _ = autograd.sparse_mla(
            q, keys.to(q.dtype), chosen, softmax_scale=c.softmax_scale, dim_v=c.kv_lora_rank
        )
        return torch.einsum("thc,hvc->thv", out, self._halves()[1]).flatten(1)


class Mlp(nn.Module):
    def __init__(self, hidden: int, inter: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inter, bias=False)
        self.up_proj = nn.Linear(hidden, inter, bias=False)
        self.down_proj = nn.Linear(inter, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Gate(nn.Module):
    """The router's weight, its bias, and how many tokens each expert got since the last update.

    The bias keeps the load even without a loss: after a step it rises for experts below the mean
    and falls for those above.
    """

    load: Tensor
    e_score_correction_bias: Tensor

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(c.n_routed_experts))
        self.register_buffer("load", torch.zeros(c.n_routed_experts), persistent=False)

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        self.e_score_correction_bias += speed * (self.load.mean() - self.load).sign()
        self.load.zero_()


class Moe(nn.Module):
    """Routed and shared experts. The routed ones are stacks: gate and up [experts, 2 * inter,
    hidden], down [experts, hidden, inter]."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.config = c
        experts, inter, hidden = c.n_routed_experts, c.moe_intermediate_size, c.hidden_size
        self.gate = Gate(c)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * inter, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, inter))
        self.shared_experts = Mlp(hidden, c.shared_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        c, k = self.config, self.config.num_experts_per_tok
        with torch.autocast(x.device.type, enabled=False):
            logits = functional.linear(x.float(), self.gate.weight)
        ids, weights = route.reference(
            logits, self.gate.e_score_correction_bias, topk=k, groups=c.n_group,
            topk_groups=c.topk_group, scale=c.routed_scaling_factor, score=c.scoring_func,
            normalize=c.norm_topk_prob,
        )  # fmt: skip
        expert = ids.flatten()
        counts = torch.bincount(expert, minlength=c.n_routed_experts)
        if self.training:
            self.gate.load += counts
        order = expert.argsort(stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        sent = x[:, None].expand(-1, k, -1).flatten(0, 1).index_select(0, order)
        inner = _gated(_by_expert(sent, self.gate_up, counts))
        answer = _by_expert(inner, self.down, counts).index_select(0, back)
        answer = answer.view(-1, k, c.hidden_size)
        mixed = (answer * weights[..., None].to(answer.dtype)).sum(1)
        out: Tensor = mixed + self.shared_experts(x)
        return out


def _by_expert(x: Tensor, stack: Tensor, counts: Tensor) -> Tensor:
    """x [rows, in], sorted by expert, times each expert's [out, in] of the stack. A device has one
    product for all experts and need not wait for the counts; elsewhere it is a product each."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        ends = counts.cumsum(0).int()
        out: Tensor = functional.grouped_mm(x, stack.to(x.dtype).transpose(1, 2), offs=ends)
        return out
    parts = zip(x.split(counts.tolist()), stack.unbind(), strict=True)
    return torch.cat([functional.linear(some, weight) for some, weight in parts])


def _gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return functional.silu(gate) * up


class Block(nn.Module):
    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = Moe(c) if c.is_moe(layer) else Mlp(c.hidden_size, c.intermediate_size)

    def forward(self, x: Tensor, rows: Rows, stage: StageName) -> tuple[Tensor, Tensor | None]:
        out, loss = self.self_attn(self.input_layernorm(x), rows, stage)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), loss


class Network(nn.Module):
    """Token ids [batch, length] -> logits, and what a stage wants beside them. Names of parameters
    follow the published ones; `export` maps the experts' stacks."""

    def __init__(self, config: ModelConfig, seed: int = 0, init_std: float = 0.02) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise(seed, init_std)
        self._rope: RopeTable | None = None

    @torch.no_grad()
    def _initialise(self, seed: int, std: float) -> None:
        """Matrices fan_in^-0.5, those that end a residual branch smaller by sqrt(2 * layers)."""
        generator = torch.Generator().manual_seed(seed)
        depth = math.sqrt(2 * self.config.num_hidden_layers)
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue
            width = p.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight", ".down")):
                width /= depth
            elif name in ("embed_tokens.weight", "lm_head.weight"):
                width = std
            p.normal_(0, width, generator=generator)

    def forward(self, tokens: Tensor, stage: StageName) -> tuple[Tensor, Tensor]:
        """-> logits [batch, length, vocab], and the mean over the layers of what they give beside
        (see `Attention`)."""
        hidden, beside = self.hidden(tokens, stage)
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return functional.linear(hidden, head.weight).view(*tokens.shape, -1), beside

    def hidden(self, tokens: Tensor, stage: StageName) -> tuple[Tensor, Tensor]:
        """-> what the head reads [tokens, hidden], and the mean as in `forward`."""
        batch, length = tokens.shape
        if self._rope is None:
            self._rope = RopeTable(self.config, tokens.device)
        rows = Rows.of(batch, length, self._rope.upto(length))
        x = self.embed_tokens(tokens.flatten())
        beside = []
        for layer in self.layers:
            x, given = layer(x, rows, stage)
            beside.append(x.new_zeros(()) if given is None else given)
        return self.norm(x), torch.stack(beside).mean(0)

    def gates(self) -> list[Gate]:
        return [m for m in self.modules() if isinstance(m, Gate)]

    def indexer_parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.named_parameters() if ".indexer." in n}

    def model_parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.named_parameters() if ".indexer." not in n}
