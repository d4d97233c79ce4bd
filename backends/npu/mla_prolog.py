"""mla_prolog on Ascend."""

from typing import Any

import torch
from torch import Tensor

from dsa_hal.backends.npu._attention import meta, meta_pool
from dsa_hal.backends.npu._library import call, refusal
from dsa_hal.backends.npu.pack_prolog import cast
from dsa_hal.ops.layout import KVLayout
from dsa_hal.ops.prolog import mla_prolog


def _why_not(
    x: Tensor, weights: list[Tensor], q_norm: Tensor, kv_norm: Tensor, positions: Tensor,
    cos_sin: Tensor, pages: Tensor, slots: Tensor, *, layout: str, eps: float = 1e-6,
) -> str | None:  # fmt: skip
    form = KVLayout.parse(layout)
    if form.order != "split":
        return (
            f"writes latents and rotated parts to a piece each (latent_bf16_split); layout {layout}"
            f" keeps them in {form.order} order"
        )
    tokens, table = x.shape[0], meta(x.shape[0], cos_sin.shape[1], dtype=torch.bfloat16)
    arguments = _arguments(
        meta(*x.shape, dtype=x.dtype), [meta(*w.shape, dtype=w.dtype) for w in weights[:4]],
        meta(*q_norm.shape), meta(*kv_norm.shape), table, table, meta_pool(pages), meta(tokens),
        layout, eps,
    )  # fmt: skip
    return refusal("npu_mla_prolog_v3", **arguments)


@mla_prolog.impl("npu", "mla_prolog_v3", contract=1, why_not=_why_not, promises=())
def forward(
    x: Tensor, weights: list[Tensor], q_norm: Tensor, kv_norm: Tensor, positions: Tensor,
    cos_sin: Tensor, pages: Tensor, slots: Tensor, *, layout: str, eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Everything in one launch. It takes neighbouring columns as pairs and gives halves, so cosines
    and sines stand once for each half. Weights that were not packed are cast for every call."""
    if not x.shape[0]:
        heads, _, lora = weights[2].shape
        return (
            x.new_empty(0, heads, lora), x.new_empty(0, heads, cos_sin.shape[1]),
            x.new_empty(0, weights[0].shape[1]),
        )  # fmt: skip
    cos, sin = (half.repeat(1, 2) for half in cos_sin[positions.long()].chunk(2, -1))
    packed = weights if len(weights) > 4 else cast(weights)
    query, query_rope, _, qr, _ = call(
        "npu_mla_prolog_v3",
        **_arguments(x.contiguous(), packed, q_norm, kv_norm, cos, sin, pages, slots, layout, eps),
    )
    return query, query_rope, qr


def _arguments(
    x: Tensor, weights: list[Tensor], q_norm: Tensor, kv_norm: Tensor, cos: Tensor, sin: Tensor,
    pages: Tensor, slots: Tensor, layout: str, eps: float,
) -> dict[str, Any]:  # fmt: skip
    """The keywords. Norms and the rotary table are rounded to bf16, which is all it takes."""
    q_a, q_b, k_b, kv_a = weights[:4]
    parts = KVLayout.parse(layout).views(pages)
    return dict(
        token_x=x,
        weight_dq=q_a,
        weight_uq_qr=q_b,
        weight_uk=k_b,
        weight_dkv_kr=kv_a,
        rmsnorm_gamma_cq=q_norm.to(torch.bfloat16),
        rmsnorm_gamma_ckv=kv_norm.to(torch.bfloat16),
        rope_sin=sin.to(torch.bfloat16),
        rope_cos=cos.to(torch.bfloat16),
        kv_cache=parts["latent"][:, :, None],
        kr_cache=parts["rope"][:, :, None],
        cache_index=slots.to(torch.int64),
        rmsnorm_epsilon_cq=eps,
        rmsnorm_epsilon_ckv=eps,
        cache_mode="PA_BSND",
        query_norm_flag=True,
    )
