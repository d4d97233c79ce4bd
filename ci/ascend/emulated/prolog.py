"""What stands before attention, in one op; and the format that it wants its matrices in.

Sources: op-plugin, docs/zh/custom_APIs/torch_npu, the page of each op; for the order of rotated
columns and for what is rounded in between, CANN's golden of mla_prolog_v3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ci.ascend.emulated._need import FLOATS, dense, need, of, undefined

BF16 = (torch.bfloat16,)
ND, FRACTAL_NZ = 2, 29

_formats: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Tensor -> its format where it is not ND. What NZ looks like in memory is not emulated."""


def npu_format_cast(input: Tensor, acl_format: int) -> Tensor:
    """The same values in another order in memory."""
    need(acl_format in (ND, FRACTAL_NZ), f"acl_format {acl_format} is not emulated")
    need(input.dtype in (*FLOATS, torch.int8), f"input is {input.dtype}")
    need(acl_format == ND or input.dim() >= 2, f"input is {list(input.shape)}")
    out = input.clone(memory_format=torch.contiguous_format)
    if acl_format != ND:
        _formats[out] = acl_format
    return out


def _normed(x: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring columns are a pair; all first ones come out before all second ones."""
    wide = torch.cat([x[..., ::2], x[..., 1::2]], -1).float()
    first, second = wide.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (wide * cos.float() + turned * sin.float()).to(x.dtype)


def npu_mla_prolog_v3(
    token_x: Tensor, weight_dq: Tensor, weight_uq_qr: Tensor, weight_uk: Tensor,
    weight_dkv_kr: Tensor, rmsnorm_gamma_cq: Tensor, rmsnorm_gamma_ckv: Tensor, rope_sin: Tensor,
    rope_cos: Tensor, kv_cache: Tensor, kr_cache: Tensor, cache_index: Tensor | None,
    rmsnorm_epsilon_cq: float, rmsnorm_epsilon_ckv: float, cache_mode: str, query_norm_flag: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(absorbed queries [tokens, heads, 512], their rotated parts [tokens, heads, 64], nothing,
    normed latent queries [tokens, 1536], nothing), bf16 throughout; writes the token's latent and
    rotated key to its slot in the caches."""
    of("token_x", token_x, BF16, None, None)
    tokens, hidden = token_x.shape
    need(hidden in (7168, 7680, 6144), f"the hidden size is {hidden}: 7168, 7680 or 6144")
    of("weight_dq", weight_dq, BF16, hidden, 1536)
    of("weight_uk", weight_uk, BF16, None, 128, 512)
    heads = weight_uk.shape[0]
    need(heads in (1, 2, 4, 8, 16, 32, 64, 128), f"{heads} heads: a power of two up to 128")
    of("weight_uq_qr", weight_uq_qr, BF16, 1536, heads * 192)
    of("weight_dkv_kr", weight_dkv_kr, BF16, hidden, 576)
    for name, weight in (
        ("weight_dq", weight_dq), ("weight_uq_qr", weight_uq_qr), ("weight_dkv_kr", weight_dkv_kr),
    ):  # fmt: skip
        need(_formats.get(weight) == FRACTAL_NZ, f"{name} is not in FRACTAL_NZ")
    of("rmsnorm_gamma_cq", rmsnorm_gamma_cq, BF16, 1536)
    of("rmsnorm_gamma_ckv", rmsnorm_gamma_ckv, BF16, 512)
    of("rope_sin", rope_sin, BF16, tokens, 64)
    of("rope_cos", rope_cos, BF16, tokens, 64)
    of("kv_cache", kv_cache, BF16, None, None, 1, 512)
    pages, page = kv_cache.shape[:2]
    need(page in (16, 128), f"a page has {page} tokens: 16 or 128")
    of("kr_cache", kr_cache, BF16, pages, page, 1, 64)
    need(cache_mode == "PA_BSND", f"cache_mode {cache_mode} is not emulated")
    of("cache_index", cache_index, (torch.int64,), tokens)
    assert cache_index is not None
    inside = bool(((cache_index >= 0) & (cache_index < pages * page)).all())
    need(inside, f"cache_index leaves [0, {pages * page})")
    dense(token_x=token_x, weight_uk=weight_uk, kv_cache=kv_cache, kr_cache=kr_cache)
    latent = _normed(token_x @ weight_dq, rmsnorm_gamma_cq, rmsnorm_epsilon_cq)
    query = (latent @ weight_uq_qr).view(tokens, heads, 192)
    absorbed = torch.einsum("thd,hdl->thl", query[..., :128].float(), weight_uk.float())
    cos, sin = rope_cos[:, None], rope_sin[:, None]
    own = (token_x @ weight_dkv_kr).split([512, 64], -1)
    slots = (cache_index // page, cache_index % page, 0)
    kv_cache[slots] = _normed(own[0], rmsnorm_gamma_ckv, rmsnorm_epsilon_ckv)
    kr_cache[slots] = _rotated(own[1], rope_cos, rope_sin)
    nothing = undefined(1, dtype=torch.float32)
    normed = latent if query_norm_flag else undefined(1, dtype=torch.bfloat16)
    rotated = _rotated(query[..., 128:], cos, sin)
    return absorbed.to(torch.bfloat16), rotated, nothing, normed, nothing.clone()
