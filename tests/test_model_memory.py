"""Memory: loading holds the weights once, and prefill grows with the context, not its square.

Each measurement is a process of its own, because a peak is a process's; peaks are Linux's VmHWM.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from random_model import CONFIG, random_checkpoint, random_tensors
from safetensors.torch import save_file

from dsa_hal.model.config import ModelConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

MIB = 1 << 20
ROOT = Path(__file__).parents[1]

# The checkpoint starts a new file mapping now and then, so that pages it has read do not add up;
# here earlier than usual, so that a small checkpoint can show it.
PROGRAM = """
import json, re, sys, time
import torch
import dsa_hal.model.checkpoint
from dsa_hal.model import Transformer
torch.set_num_threads(1)
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
folder, length, remap = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dsa_hal.model.checkpoint._REMAP_BYTES = remap or dsa_hal.model.checkpoint._REMAP_BYTES
before = peak()
model = Transformer.from_pretrained(folder)
loaded = peak()
start = time.perf_counter()
if length:
    cache, contexts = model.new_cache([length])
    for _ in model.prefill(cache, contexts, [torch.arange(length) % 250 + 2]):
        pass
seconds = time.perf_counter() - start
print(json.dumps(dict(loading=loaded - before, peak=peak(), seconds=seconds)))
"""


def measured(folder: Path, length: int = 0, remap: int = 0) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(length), str(remap)],
        check=True, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    result: dict[str, float] = json.loads(done.stdout)
    return result


def written(folder: Path, config: ModelConfig) -> int:
    """Save a random checkpoint; how many weights it has."""
    tensors = dict(random_tensors(config, 0))
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return sum(t.numel() for name, t in tensors.items() if not name.endswith("_scale_inv"))


@pytest.mark.parametrize("stored", ["bf16", "fp8"])
def test_loading_holds_the_weights_once(stored: str, tmp_path: Path) -> None:
    """On the CPU, bf16 weights stay as they are and FP8 ones become fp32."""
    config = replace(
        CONFIG, n_routed_experts=96, moe_intermediate_size=512, num_hidden_layers=2,
        quant=CONFIG.quant if stored == "fp8" else None,
    )  # fmt: skip
    weights = written(tmp_path, config)
    held = weights * (4 if stored == "fp8" else 2)
    loading = measured(tmp_path, remap=8 * MIB)["loading"]
    assert held > 150 * MIB
    assert 0.9 * held < loading < 1.3 * held + 24 * MIB


def test_prefill_memory_grows_linearly(tmp_path: Path) -> None:
    """Twice the context, about twice the growth; a whole matrix of scores would be 256 MiB."""
    config = replace(
        CONFIG, num_hidden_layers=1, num_attention_heads=2, index_n_heads=2, index_topk=32,
        q_lora_rank=128, hidden_size=128, intermediate_size=128,
    )  # fmt: skip
    written(tmp_path, config)
    # Twice, since how much of torch's own code is resident varies by tens of MiB.
    peaks = [
        min(measured(tmp_path, length)["peak"] for _ in range(2)) for length in (2048, 4096, 8192)
    ]
    growth = peaks[1] - peaks[0], peaks[2] - peaks[1]
    assert growth[1] < 2.5 * growth[0] + 32 * MIB
    assert peaks[2] < 768 * MIB


@pytest.mark.slow
def test_32768_tokens_prefill_in_4_gib(tmp_path: Path) -> None:
    got = measured(random_checkpoint(tmp_path), 32768)
    assert got["peak"] < 4096 * MIB
