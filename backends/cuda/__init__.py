"""NVIDIA Hopper: H800 and H200."""

from __future__ import annotations

import torch

from dsa_hal.target import Target


def target() -> Target | str:
    """The first CUDA device of this process, or why there is none."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
    major, minor = torch.cuda.get_device_capability()
    return Target("cuda", f"sm{major}{minor}", "cuda", torch.cuda.get_device_name(), score=100)
