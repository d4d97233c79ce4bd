"""Which numbers the integer arguments of each op may hold; `dsa_hal.data` looks at them on request.
Ranges that an op clips by itself are not here."""

from collections.abc import Callable

import torch
from torch import Tensor

from dsa_hal.case import Inputs
from dsa_hal.data import RULES, Whole, columns_below


def _rows(name: str) -> Callable[[Inputs], int]:
    return lambda inputs: int(inputs[name].shape[0])


def _pool(inputs: Inputs) -> int:
    return int(inputs["pages"].shape[0] * inputs["pages"].shape[1])


def _groups(inputs: Inputs) -> int:
    return int(inputs["b"].shape[0])


def _latents(inputs: Inputs) -> int:
    """Keys that mla_attention's indices may name: slots of pages, or rows of a latent tensor."""
    kv = inputs["kv"]
    return int(kv.shape[0] * kv.shape[1]) if inputs["layout"] else int(kv.shape[0])


def _positions_seen(inputs: Inputs) -> Tensor:
    """Entries of block_table [batch, max_pages] that hold positions below a request's limits."""
    table, size = inputs["block_table"], inputs["pages"].shape[1]
    used = inputs["context_lens"].amax(-1).clamp(0, inputs["max_context_len"])
    page = torch.arange(table.shape[1], device=table.device)
    return torch.lt(page * size, used[:, None])


def _pages_named(inputs: Inputs) -> Tensor:
    """Entries of to_slots' block_table that some position names."""
    table, size = inputs["block_table"], inputs["page_size"]
    ids = inputs["indices"]
    named = torch.zeros(table.shape, dtype=torch.bool, device=table.device)
    request = torch.arange(ids.shape[0], device=ids.device) // inputs["rows_per_request"]
    page = ids.clamp_min(0) // size
    keep = (ids >= 0) & (page < table.shape[1])
    named[request[:, None].expand_as(ids)[keep], page[keep].long()] = True
    return named


def _keys_held(inputs: Inputs) -> Tensor:
    """Entries of block_table [requests, max_pages] that hold keys of requests with new tokens."""
    table, size = inputs["block_table"], inputs["pages"].shape[1]
    page = torch.arange(table.shape[1], device=table.device)
    reach = inputs["context_lens"] * (inputs["cu_seqlens_q"].diff() > 0)
    return torch.lt(page * size, reach[:, None])


def _room(inputs: Inputs) -> int:
    return int(inputs["block_table"].shape[1] * inputs["pages"].shape[1])


_NO_KEY = "-1 (no key) or the number of a key"
_SLOT = "-1 (none) or a slot of the pool"

_CHOSEN = Whole("indices", _rows("kv"), _NO_KEY, -1, columns_below("indices", "topk_length"))
_SELECTED = Whole("indices", _rows("kv"), _NO_KEY, -1)
_TABLE = Whole("block_table", _rows("pages"), "a page of the pool", 0, _positions_seen)
_LIMITS = Whole(
    "context_lens",
    lambda i: min(i["max_context_len"], i["block_table"].shape[1] * i["pages"].shape[1]) + 1,
    "a limit within max_context_len and the request's pages",
)
_FLAT = (
    Whole("cu_seqlens_q", lambda i: i["q"].shape[0] + 1, "where a request's tokens begin"),
    Whole(
        "context_lens",
        lambda i: min(i.get("max_context_len", _room(i)), _room(i)) + 1,
        "a number of keys within max_context_len and the request's pages",
    ),
    Whole("block_table", _rows("pages"), "a page of the pool", 0, _keys_held),
)
_STORED = Whole("slots", _pool, _SLOT, -1)
_TURN = Whole("positions", _rows("cos_sin"), "a row of cos_sin")
_LAYOUT = Whole("grouped_layout", _groups, "-1 (padding) or a group", -1)


def _ends(keys: str) -> tuple[Whole, Whole]:
    def some(inputs: Inputs) -> Tensor:
        return torch.gt(inputs["ke"], inputs["ks"])

    return (
        Whole("ks", lambda i: i[keys].shape[0] + 1, "a key", 0, some),
        Whole("ke", lambda i: i[keys].shape[0] + 1, "a number of keys", 0, some),
    )


RULES.update(
    sparse_mla=(_CHOSEN,),
    sparse_mla_bwd=(_CHOSEN,),
    sparse_mla_paged=(
        Whole("indices", _pool, _NO_KEY, -1, columns_below("indices", "topk_length")),
    ),
    mla_attention=(Whole("indices", _latents, _NO_KEY, -1),),
    indexer_kl=(_SELECTED,),
    dense_mla=_ends("kv"),
    mha_prefill=(*_ends("k"), Whole("indices", _rows("k"), _NO_KEY, -1)),
    indexer_logits_paged=(_LIMITS, _TABLE),
    indexer_topk_paged=(_LIMITS, _TABLE),
    indexer_topk_varlen=_FLAT,
    mla_attention_varlen=(
        *_FLAT, Whole("positions", _room, "-1 (no key) or a position on the request's pages", -1),
    ),
    to_slots=(
        Whole("indices", lambda i: i["block_table"].shape[1] * i["page_size"],
              "-1 (none) or a position on the request's pages", -1),
        Whole("block_table", lambda i: 2**31 // i["page_size"],
              "a page that was allocated", 0, _pages_named),
    ),
    store_latent=(_STORED,),
    store_index_key=(_STORED,),
    gather_latent=(_STORED,),
    gather_index_key=(_STORED,),
    rope=(_TURN,),
    indexer_qk=(_TURN,),
    latent_qkv=(_TURN,),
    mla_prolog=(Whole("slots", _pool, "a slot of the pool"), _TURN),
    permute=(Whole("ids", lambda i: i["experts"], "-1 (not here) or an expert", -1),),
    unpermute=(Whole("position", _rows("rows"), "-1 (not here) or a row", -1),),
    moe_experts=(Whole("ids", lambda i: i["w13"][0].shape[0], "-1 (not here) or an expert", -1),),
    grouped_gemm=(_LAYOUT,),
    grouped_fp8_gemm=(_LAYOUT,),
    grouped_fp8_gemm_masked=(
        Whole("masked_m", lambda i: i["a"].shape[1] + 1, "a number of rows"),
    ),
    grouped_linear=(
        Whole("grouped_layout", lambda i: i["weight"][0].shape[0], "-1 (padding) or a group", -1),
    ),
    plan=(Whole("lengths", lambda i: 2**31, "a number of keys"),),
)  # fmt: skip
