"""The one door to torch_npu's ops: `call` runs one, `refusal` says why it would not."""

from __future__ import annotations

from typing import Any

import torch

from dsa_hal.backends.npu import _constraints, _probe
from dsa_hal.errors import Absent, BadInput
from dsa_hal.selection import current, selection


def call(name: str, **arguments: Any) -> Any:
    """Run `torch.ops.npu.<name>`; every argument by the schema's keyword, none by position, so that
    versions which append arguments take the call alike.

    Under DSA_HAL_CHECK=1 (`use(checked=True)`) the constraint table judges the call first: BadInput
    with what `refusal` says. Raises Absent where no library has registered the op.
    """
    if selection().checked and (wrong := refusal(name, **arguments)) is not None:
        raise BadInput(wrong)
    try:
        op = getattr(torch.ops.npu, name)
    except AttributeError:
        raise Absent(
            f"torch.ops.npu has no {name}; install torch_npu as the README's section on Ascend says"
        ) from None
    return op(**arguments)


def refusal(name: str, **arguments: Any) -> str | None:
    """Why this call cannot be made on the target in force, or None: first whether torch_npu and
    CANN have the op at all, where the target is a device of this machine; then what the constraint
    table says. Reads shapes, dtypes, strides and plain arguments, so that meta tensors will do;
    implementations' predicates put 1 where an axis may vary (tokens, requests, pages).

    An op that the table does not know is a mistake of the caller's: KeyError.
    """
    entry = _constraints.table()[name]
    target = current()
    if target.device == "npu" and (absent := _probe.missing(name, entry.aclnn)) is not None:
        return absent
    return entry.problem(target.arch, arguments)
