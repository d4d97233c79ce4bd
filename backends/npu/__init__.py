"""Huawei Ascend: 910B (A2), 910C (A3) and 950, through torch_npu."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from dsa_hal.target import Architecture, Target

PAGE = 128
"""Tokens of a page. The kernels document multiples of 16 up to 1024; deployed stacks run 128."""

CACHES = {
    "latent_bf16": "latent_bf16_split",
    "latent_int8": "latent_int8",
    "index_bf16": "index_bf16",
    "index_int8": "index_int8_split",
}

ARCHITECTURES = (
    Architecture(
        "a2", "Ascend910B2", processors=24, shared=192 << 10, memory=64 << 30, page_size=PAGE,
        caches=CACHES,
        source="bishengir-compile's limits of Ascend910B2; vllm-ascend's page on DeepSeek-V3.2",
    ),
    Architecture(
        "a3", "Ascend910_9392", processors=24, shared=192 << 10, memory=64 << 30, page_size=PAGE,
        caches=CACHES,
        source="bishengir-compile's limits of Ascend910_9392; vllm-ascend's page on DeepSeek-V3.2",
    ),
    Architecture(
        "950", "Ascend950PR_9589", processors=32, shared=248 << 10, fp8=torch.float8_e4m3fn,
        memory=128e9, bytes_per_s=1.6e12, flop_per_s={"float8_e4m3fn": 1e15}, page_size=PAGE,
        caches=CACHES,
        source="bishengir-compile's limits of Ascend950PR_9589; the rest as announced for the 950PR"
        " at Huawei Connect 2025",
    ),
)  # fmt: skip
"""What is known of them without a device: cube cores, and the unified buffer as the memory of a
block. An a3 is one of a 910C's two dies, which torch_npu counts as devices. A2 and A3 multiply no
FP8; Huawei publishes no rates of theirs."""

NAMES = {
    r"Ascend910B[1-9].*": "a2",  # the plain 910B is of the first generation
    r"Ascend910_93\d\d": "a3",
    r"Ascend950(PR|DT)_.*": "950",
    r"Ascend910_95.*": "950",  # what CANN 8 called it
}
"""What torch_npu calls the devices of each architecture (its table of SoC versions, 2.13.0)."""

DRIVER = Path("/usr/local/Ascend/driver/version.info")


def target() -> Target | str:
    """The first NPU of this process, or why there is none; torch_npu is imported only to ask it."""
    if find_spec("torch_npu") is None:
        return "torch_npu is not installed; it and CANN are needed for Ascend devices"
    from dsa_hal.backends.portable.library import imported

    torch_npu = imported("torch_npu")
    if isinstance(torch_npu, str):
        return f"{torch_npu}; source CANN's set_env.sh"
    if not torch_npu.npu.is_available():
        return "torch_npu finds no NPU; check `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES"
    name = torch_npu.npu.get_device_name()
    arch = architecture(name)
    if arch is None:
        return (
            f"the NPU is an {name}, which is none of Ascend910B1 and later (a2), Ascend910_93xx"
            " (a3) and Ascend950 (950); nothing here was written for it"
        )
    return Target("npu", arch, "npu", name, score=100)


def architecture(name: str) -> str | None:
    """The architecture of a device that torch_npu calls `name`."""
    return next((arch for form, arch in NAMES.items() if re.fullmatch(form, name)), None)


def driver() -> str | None:
    """The driver's version and CANN's; None where neither is known."""
    return ", ".join(_versions()) or None


def _versions() -> Iterator[str]:
    if (found := _version(DRIVER)) is not None:
        yield found
    home = os.environ.get("ASCEND_HOME_PATH")
    for file in sorted(Path(home).glob("*/ascend_*_install.info")) if home else ():
        if (found := _version(file)) is not None:
            yield f"CANN {found}"
            return


def _version(file: Path) -> str | None:
    """The first `version=...` in a file."""
    if not file.is_file():
        return None
    found = re.search(r"^version=(\S+)", file.read_text(), re.M | re.I)
    return found and found[1]


def missing() -> dict[str, str]:
    """What this machine's torch_npu and CANN lack of the ops that implementations call, and the
    sentence of it."""
    from dsa_hal.backends.npu import _constraints, _probe

    asked = {name: entry.aclnn for name, entry in _constraints.table().items()}
    absent = {name: _probe.missing(name, functions) for name, functions in asked.items()}
    return {name: sentence for name, sentence in absent.items() if sentence is not None}
