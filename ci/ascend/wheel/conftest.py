"""Imports torch_npu over the libraries made here, before anything imports dsa_hal's ops."""

import warnings

from ci.ascend.wheel import libraries

libraries.load()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of ASCEND_HOME_PATH, and of what torch_npu uses of torch
    import torch_npu  # noqa: F401
