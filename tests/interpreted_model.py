"""A process of its own, for `test_interpreter.py`: a small FP8 model with random weights, whose
programs are interpreted as those of the target named; prints relative errors of logits in JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import random_model
import torch
from small import SMALL
from torch import Tensor

import dsa_hal
from dsa_hal.backends.portable import interpreter
from dsa_hal.model import Transformer
from dsa_hal.target import stand_in

CONFIG = replace(
    SMALL, vocab_size=384, bos_token_id=0, index_head_dim=128, kv_lora_rank=512, index_topk=32
)
"""The published caches' widths; every key is selected, so that near ties decide nothing."""


def logits(model: Transformer, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of a prefill in one piece; and of the last tokens decoded after a prefill in chunks."""
    cache, contexts = model.new_cache([ids.shape[1]])
    for _ in model.prefill(cache, contexts, [ids[0, :20]], chunk=12):
        pass
    decoded = [model.decode(cache, contexts, t) for t in ids[:, 20:].split(1, 1)]
    return model(ids), torch.cat(decoded, 1)


def off(got: Tensor, want: Tensor) -> float:
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).median())


def main(target: str) -> None:
    interpreter.start()
    torch.set_num_threads(1)
    ids = torch.randint(2, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as home, patch.object(random_model, "CONFIG", CONFIG):
        folder = random_model.random_checkpoint(Path(home))
        with dsa_hal.use(backend="cpu"):
            want = logits(Transformer.from_pretrained(folder), ids)
            exact = logits(Transformer.from_pretrained(folder, precision="fp32"), ids)
        with dsa_hal.use(target=stand_in(target, "cpu")):
            model = Transformer.from_pretrained(folder)
            got = logits(model, ids)
    names = ("prefill", "decode")
    told = {
        name: [off(g, e), off(w, e)] for name, g, w, e in zip(names, got, want, exact, strict=True)
    }
    json.dump({"formats": str(model.formats), **told}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
