"""gather_latent on Ascend."""

import torch
from torch import Tensor

from dsa_hal.backends.npu._slots import read, unfit
from dsa_hal.ops.cache import gather_latent
from dsa_hal.ops.layout import KVLayout


def _why_not(
    pages: Tensor, slots: Tensor, *, layout: str, out_dtype: torch.dtype = torch.bfloat16
) -> str | None:
    return unfit(layout)


@gather_latent.impl("npu", "torch", contract=1, rank=-1, why_not=_why_not)
def gather(
    pages: Tensor, slots: Tensor, *, layout: str, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """torch's own selection of rows; where the model runs, the kernels read pages themselves."""
    return KVLayout.parse(layout).decode(read(pages, slots, layout)).to(out_dtype)
