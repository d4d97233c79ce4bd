"""gather_index_key on Ascend."""

import torch
from torch import Tensor

from dsa_hal.backends.npu._slots import read, unfit
from dsa_hal.ops.cache import gather_index_key
from dsa_hal.ops.layout import SCALE, KVLayout


def _why_not(pages: Tensor, slots: Tensor, *, layout: str) -> str | None:
    return unfit(layout)


@gather_index_key.impl("npu", "torch", contract=1, rank=-1, why_not=_why_not)
def gather(pages: Tensor, slots: Tensor, *, layout: str) -> tuple[Tensor, Tensor]:
    """torch's own selection of rows; where the model runs, the kernels read pages themselves."""
    parts = read(pages, slots, layout)
    key = parts[KVLayout.parse(layout).parts[0].name].contiguous()
    if SCALE in parts:
        return key, parts[SCALE][:, 0].float()
    return key, torch.where(slots < 0, 0.0, 1.0)
