"""A process on a machine with an NPU, as far as questions go: run as a script beside a `torch_npu`
and a `libopapi.so` made for the test, it prints what dsa_hal makes of them, as JSON; with the
argument "doctor", what doctor makes of them too."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

PACKAGE = '''
"""In the place of torch_npu: a device by name, and the names of ops."""

from torch.library import Library

_library = Library("npu", "FRAGMENT")
for _name in {ops!r}:
    _library.define(_name + "(Tensor x) -> Tensor")


class npu:
    is_available = staticmethod(lambda: {here!r})
    get_device_name = staticmethod(lambda: {device!r})
'''


def package(folder: Path, ops: list[str], device: str = "Ascend910B2", here: bool = True) -> None:
    """A `torch_npu` in `folder`."""
    text = PACKAGE.format(ops=sorted(ops), here=here, device=device)
    (folder / "torch_npu.py").write_text(text)


def answers() -> dict[str, Any]:
    """The target, what the libraries lack, and what serves a call of the paged indexer, with the
    refusal of what does not."""
    import torch

    from dsa_hal.backends import npu
    from dsa_hal.backends.npu import _probe
    from dsa_hal.cli import doctor
    from dsa_hal.ops import indexer_topk_paged
    from dsa_hal.selection import explain, use
    from dsa_hal.target import probe

    target = probe("npu")
    if isinstance(target, str):
        return {"target": target, "driver": npu.driver()}

    def meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with use(target=target):
        verdicts = explain(
            indexer_topk_paged, meta(torch.bfloat16, 2, 1, 64, 128),
            meta(torch.bfloat16, 9, 128, 128), meta(torch.float32, 2, 64),
            meta(torch.int32, 2, 1), meta(torch.int32, 2, 4), 2048, layout="index_bf16/128",
            max_context_len=512,
        )  # fmt: skip
    return {
        "target": str(target),
        "name": target.name,
        "driver": npu.driver(),
        "libraries": [library._name for library in _probe.libraries()],
        "missing": npu.missing(),
        "doctor": [asdict(f) for f in doctor._libraries()] if "doctor" in sys.argv else [],
        "verdicts": [[v.impl.label, v.question, v.reason] for v in verdicts],
    }


if __name__ == "__main__":
    json.dump(answers(), sys.stdout)
