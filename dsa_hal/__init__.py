"""dsa_hal: one set of ops for DeepSeek Sparse Attention, on whatever device is there.

import dsa_hal
indices = dsa_hal.ops.topk(logits, 2048)          # a called op chooses its implementation
attend = dsa_hal.ops.sparse_mla.bind(q, kv, ...)  # a bound op has chosen
with dsa_hal.use(topk="reference"): ...           # an explicit choice is strict
torch.ops.dsa_hal.topk                            # the same op for compilers and runtimes
"""

from dsa_hal import ops
from dsa_hal.errors import DsaHalError
from dsa_hal.library import publish_all
from dsa_hal.selection import Unsupported, current, explain, use
from dsa_hal.support import support
from dsa_hal.target import Target
from dsa_hal.version import __version__

publish_all()

__all__ = [
    "DsaHalError",
    "Target",
    "Unsupported",
    "__version__",
    "current",
    "explain",
    "ops",
    "support",
    "use",
]
