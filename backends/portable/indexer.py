"""The indexer's scores, and its loss with gradients, in plain torch, some queries at a time."""

import torch
from torch import Tensor

from dsa_hal.backends.portable.chunks import Limits, of_ranges, of_selection
from dsa_hal.backends.portable.keys import Keys, Ranges, Selection, Stretch, product


def logits(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, limits: Limits
) -> Tensor:
    """`indexer_logits`. FP8 becomes bf16, which holds every number of it."""
    (tokens, heads, _), context = q.shape, k.shape[0]
    if q.dtype == torch.float8_e4m3fn:
        q, k = q.to(torch.bfloat16), k.to(torch.bfloat16)
    factors = limits.factors(q.dtype)
    out = torch.full((tokens, context), -torch.inf, device=q.device)
    ranges = Ranges(ks.clamp(0, context), ke.clamp(0, context), context, limits)
    score = heads * factors.itemsize + 8
    for chunk in of_ranges(
        ranges.first, ranges.last, context, heads=heads, score=score, limits=limits
    ):
        keys, allowed = Stretch(k, chunk, factors), ranges.allowed(chunk)
        (products,) = keys.against(q[chunk.rows].to(factors), result=factors)
        found = weighted(weights[chunk.rows], products.relu_()).mul_(k_scale[keys.span])
        if allowed is not None:
            found.masked_fill_(~allowed, -torch.inf)
        out[chunk.rows, keys.span] = found
    return out


def weighted(weights: Tensor, products: Tensor) -> Tensor:
    """Sum over the heads of weights [c, heads] fp32 times products [c, heads, n]: [c, n] fp32.
    Beside bf16 products a weight is the sum of two bf16 numbers, 16 bits of it."""
    rows = weights[:, None]
    if products.dtype == torch.float32:
        return product(rows, products)[:, 0]
    upper = rows.to(products.dtype)
    lower = (rows - upper.float()).to(products.dtype)
    return product(torch.cat([upper, lower], 1), products).sum(1)


def divergence(
    q_index: Tensor, k_index: Tensor, weights: Tensor, q: Tensor, kv: Tensor, ks: Tensor | None,
    ke: Tensor | None, indices: Tensor | None, row_weight: Tensor | None, *, softmax_scale: float,
    limits: Limits,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`indexer_kl`.

    With di = softmax(I) - p, times the row's weight, and r = ReLU(q_index . k_index): the weights'
    gradient is the sum of di * r over the keys; step = di where r > 0 gives the others, summed with
    k_index over the keys and times the weights, and summed with weights * q_index over the queries.
    """
    (tokens, index_heads, index_dim), (heads, dim) = q_index.shape, q.shape[1:]
    context, factors = kv.shape[0], limits.factors(q_index.dtype)
    loss = torch.zeros(tokens, device=q.device)
    dq_index = torch.zeros(q_index.shape, device=q.device)
    dk_index = torch.zeros(context + 1, index_dim, device=q.device)
    dweights = torch.zeros(tokens, index_heads, device=q.device)
    work, score = heads + index_heads, max(8 * heads, 2 * index_heads * factors.itemsize) + 24
    source: Selection | Ranges
    if indices is not None:
        chunks = of_selection(
            indices, context, heads=work, score=score, limits=limits,
            picked=score + (dim + index_dim) * factors.itemsize + 4 * index_dim,
            asked="indexer_kl: indices",
        )  # fmt: skip
        source = Selection(indices, context, limits)
    else:
        assert ks is not None and ke is not None
        source = Ranges(ks.clamp(0, context), ke.clamp(0, context), context, limits)
        chunks = of_ranges(
            source.first, source.last, context, heads=work, score=score, limits=limits
        )
    kept, index_kept = (source.readable(keys) if chunks else keys for keys in (kv, k_index))
    for chunk in chunks:
        rows, allowed = chunk.rows, source.allowed(chunk)
        hidden = None if allowed is None else ~allowed
        target = _target(q[rows], source.keys(kept, chunk), hidden, softmax_scale, limits)
        keys, query = source.keys(index_kept, chunk), q_index[rows]
        (products,) = keys.against(query.to(factors), result=factors)
        scores = weighted(weights[rows], products.relu_())
        if hidden is not None:
            scores.masked_fill_(hidden, -torch.inf)
        log = scores.log_softmax(-1)
        slope = log.exp() - target
        if hidden is not None:
            log.masked_fill_(hidden, 0)
            slope.masked_fill_(hidden, 0)
        loss[rows] = (torch.xlogy(target, target) - target * log).sum(-1)
        if row_weight is not None:
            slope.mul_(row_weight[rows, None])
        own = weights[rows, :, None]
        slope = slope.to(factors)
        dweights[rows] = product(products, slope[..., None])[..., 0]
        through = slope[:, None].expand(products.shape)
        steps = torch.ops.aten.threshold_backward(through, products, 0)  # where products > 0
        dq_index[rows] = keys.mixed(steps) * own
        keys.spread(dk_index, (steps, (query * own).to(factors)))
        del products, through, steps, keys  # before the next chunk's exist
    return loss, dq_index, dk_index[:context], dweights


def _target(
    q: Tensor, keys: Keys, hidden: Tensor | None, softmax_scale: float, limits: Limits
) -> Tensor:
    """Mean over heads of the softmax over the keys [c, n]; 0 where hidden [c, n]."""
    (scores,) = keys.against(q.to(limits.factors(q.dtype)))
    if hidden is None:
        return scores.mul_(softmax_scale).softmax(-1).mean(1)
    bias = torch.zeros(hidden.shape, device=q.device).masked_fill_(hidden, -torch.inf)
    torch.add(bias[:, None], scores, alpha=softmax_scale, out=scores)
    return scores.softmax(-1).mean(1).masked_fill_(hidden, 0)
