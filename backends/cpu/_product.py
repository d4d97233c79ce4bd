"""Products on the processor: one sgemm over weights widened a strip at a time.

fp32 is the fast dtype here: without matrix units, a bf16 product of many rows is several times
slower, while of one or two rows it is faster, because it reads half the bytes.
"""

import torch
from torch import Tensor
from torch.nn import functional

from dsa_hal.backends.cpu._fp8 import widen
from dsa_hal.errors import BadInput
from dsa_hal.ops.gemm import BLOCK
from dsa_hal.ops.quant import AMAX_FLOOR, FP8_MAX

STRIP = 1 << 20
"""Elements of a weight that are widened at a time: 4 MiB in fp32, to stay in the cache."""

EXPONENT = 0x7F800000
"""The exponent's bits of an fp32 number."""

SUBNORMAL = 2.0**-6
"""e4m3 numbers below this have less than 3 bits behind the leading one."""

FEW_ROWS = 2
"""Up to so many rows a bf16 product is done as it is."""


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [m, k] @ weight [n, k].T, summed in fp32: [m, n] in fp32, or in bf16 if both are and m is
    small. No widened copy of the whole weight is made."""
    if weight.dtype == torch.float32:
        return functional.linear(x.float(), weight)
    if x.dtype == weight.dtype == torch.bfloat16 and x.shape[0] <= FEW_ROWS:
        return functional.linear(x, weight)
    x, (n, k) = x.float(), weight.shape
    out = torch.empty(x.shape[0], n)
    step = min(n, max(1, STRIP // max(k, 1)))
    room = torch.empty(step, k)
    for at in range(0, n, max(step, 1)):
        part = room[: min(step, n - at)].copy_(weight[at : at + step])
        out[:, at : at + step] = x @ part.T
    return out


def fp8_product(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """x [m, k] fp32 @ (values * scale).T, the weight [n, k] in blocks of 128 x 128: [m, n] fp32."""
    (n, k), edge = values.shape, values.shape[1] % BLOCK
    out = torch.empty(x.shape[0], n)
    step = max(1, STRIP // max(k * BLOCK, 1)) * BLOCK
    for at in range(0, n, step):
        part = widen(values[at : at + step])
        rows = scale[at // BLOCK : (at + step) // BLOCK].repeat_interleave(BLOCK, 0)
        rows = rows[: part.shape[0], :, None]
        whole = part[:, : k - edge].view(part.shape[0], -1, BLOCK)
        whole.mul_(rows[:, : whole.shape[1]])
        if edge:
            part[:, k - edge :].mul_(rows[:, -1])
        out[:, at : at + step] = x @ part.T
    return out


def packed_product(x: Tensor, weight: list[Tensor]) -> Tensor:
    """x [m, k] @ a packed weight [n, k], canonical or this backend's: [m, n] fp32 or bf16."""
    if len(weight) == 2:
        return fp8_product(x.float(), weight[0], weight[1])
    return product(x, weight[0])


def rounded(x: Tensor, act: str) -> Tensor:
    """x [rows, k] as an FP8 product would see it, exactly, in fp32; x itself if act is "none".

    Arithmetic in fp32 instead of a conversion to FP8 and back, which takes several times as long.
    """
    if act == "none":
        return x
    rows, k = x.shape
    padding = -k % BLOCK
    wide = functional.pad(x.float(), (0, padding)) if padding else x.float()
    tiles = wide.reshape(rows, (k + padding) // BLOCK, BLOCK)
    lowest = tiles.abs().amax(-1, keepdim=True).clamp_(min=AMAX_FLOOR)
    if act == "fp8_pow2":  # rounded in x's own units, as a power of two changes no mantissa
        lowest = lowest.mul_(SUBNORMAL / FP8_MAX).view(torch.int32)
        lowest = lowest.add_(0x7FFFFF).bitwise_and_(EXPONENT).view(torch.float32)
        return _to_e4m3(tiles, lowest).view(rows, k + padding)[:, :k]
    scale = lowest.mul_(1 / FP8_MAX)
    units = _to_e4m3(tiles / scale, torch.tensor(SUBNORMAL))
    return units.mul_(scale).view(rows, k + padding)[:, :k]


def _to_e4m3(x: Tensor, lowest: Tensor) -> Tensor:
    """x fp32 rounded to 4 significant bits, ties to even; magnitudes below `lowest` to multiples of
    its eighth. Adding 1.5 * 2^20 times a number's power of two leaves its sum just these bits."""
    power = x.view(torch.int32).bitwise_and(EXPONENT).view(torch.float32)
    power = torch.maximum(power, lowest)
    return torch.add(x, power, alpha=1.5 * 2**20).sub_(power, alpha=1.5 * 2**20)


def runs(layout: Tensor, groups: int, name: str) -> list[tuple[int, int, int]]:
    """Stretches of equal groups in `layout` [m] as (group, begin, end), those of -1 left out.

    Raises BadInput for any other number outside [0, groups).
    """
    values, counts = torch.unique_consecutive(layout, return_counts=True)
    found, at = [], 0
    for group, count in zip(values.tolist(), counts.tolist(), strict=True):
        if not -1 <= group < groups:
            raise BadInput(f"{name}[{at}] is {group}; expected -1 or 0 to {groups - 1}")
        if group >= 0:
            found.append((group, at, at + count))
        at += count
    return found
