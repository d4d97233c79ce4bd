"""What the ops of training share: how their references are differentiated, and how gradients are
judged."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dsa_hal.case import Inputs, Maker
from dsa_hal.check import Check, Finding, Report, count, form

# -- inputs of cases ----------------------------------------------------------------------------


def ranges_of(
    make: Maker, ranges: str, tokens: int, context: int, sequence: int
) -> list[tuple[int, int]]:
    """A key range per query. With `sequence`, texts of that many tokens lie one behind the other.

    ranges  "causal", "ragged" (any, every third empty), "beyond" (past the last key)
    """
    if sequence:
        return [(t // sequence * sequence, t + 1) for t in range(tokens)]
    spans = []
    for token in range(tokens):
        start = make.pick.randint(0, context)
        spans.append({
            "causal": (0, max(0, min(context, context - tokens + 1 + token))),
            "ragged": (start, start if token % 3 == 0 else make.pick.randint(start, context)),
            "beyond": (start // 2 - 3, context + 9),
        }[ranges])  # fmt: skip
    return spans


# -- references and their judge -----------------------------------------------------------------

BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}
"""Root mean square error of a gradient relative to the gradient's, by the dtype of the inputs: what
operands rounded to that dtype may cost."""

FLOOR = 1e-6
"""Error that any gradient may have: where terms of size 1 cancel, fp32 leaves about this."""

ELEMENTS = 1 << 27
"""Elements of a reference's largest tensors: it takes some rows at a time."""


def judged(names: Sequence[str], dtype_of: str) -> Check:
    """Each result against the whole result's size: gradients of one key are sums that may cancel,
    so that no error is large or small on its own."""

    def check(got: Sequence[Tensor], want: Sequence[Tensor], inputs: Inputs) -> Report:
        findings = count(got, want)
        for name, g, w in zip(names, got, want, strict=False):
            findings += form(name, g, w) or near(name, g, w, BOUNDS[inputs[dtype_of].dtype])
        return Report(tuple(findings))

    return check


def near(name: str, got: Tensor, want: Tensor, bound: float) -> list[Finding]:
    """Findings on one result: all finite, the root mean square of the error within `bound` of the
    result's, and the worst element within 16 times `bound` of the largest."""
    wild = int((~got.isfinite()).sum())
    findings = [Finding(name, "inf or NaN", float(wild), 0.0, wild == 0)]
    if wild or not want.numel():
        return findings
    right = want.double()
    error = (got.double() - right).abs()
    for measure, value, limit in (
        ("rms error", error.square().mean().sqrt(), bound * right.square().mean().sqrt()),
        ("worst error", error.max(), 16 * bound * right.abs().max()),
    ):
        most = float(limit) + FLOOR
        findings.append(Finding(name, measure, float(value), most, float(value) <= most))
    return findings


def row_blocks(rows: int, row_elements: int) -> Iterator[slice]:
    """Slices of so many rows that ELEMENTS hold, at least one."""
    step = max(1, ELEMENTS // max(1, row_elements))
    yield from (slice(at, at + step) for at in range(0, rows, step))


def wide(t: Tensor) -> Tensor:
    """`t` in fp32, or as it is in fp64."""
    return t if t.dtype == torch.float64 else t.float()


def gradients(
    fn: Callable[..., Tensor], leaves: Sequence[Tensor], upstream: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """fn(*leaves) in `wide` arithmetic, and the gradients of its product with `upstream`."""
    with torch.inference_mode(False), torch.enable_grad():
        own = [wide(leaf).detach().clone().requires_grad_() for leaf in leaves]
        result = fn(*own)
        return result.detach(), torch.autograd.grad(result, own, upstream.to(result.dtype))


def picked_keys(keys: Tensor, indices: Tensor) -> Tensor:
    """Rows of keys [context, dim] by indices [..., k]; those below 0 are zeros."""
    padded = torch.cat([keys, keys.new_zeros(1, keys.shape[1])])
    return padded[torch.where(indices < 0, keys.shape[0], indices).long()]


def probabilities(scores: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the allowed entries of the last axis; all 0 where there is none."""
    nothing = ~allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~allowed, -torch.inf).masked_fill(nothing, 0)
    return scores.softmax(-1).masked_fill(nothing, 0)
