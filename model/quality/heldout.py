"""Text that a model was not trained on, as one row of tokens, and windows cut from it."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from dsa_hal.errors import BadInput
from dsa_hal.model.text import tokenised
from dsa_hal.model.tokenizer import Tokenizer


def tokens(path: Path, tokenizer: Tokenizer) -> Tensor:
    """All texts of a file as int64 [tokens], as training has them. BadInput if it cannot be
    read."""
    return torch.from_numpy(tokenised(path, tokenizer).astype(np.int64))


def windows(text: Tensor, length: int, count: int, seed: int, bos: int | None) -> list[Tensor]:
    """`count` windows of exactly `length` tokens of `text`, drawn by `seed` from those that lie
    side by side. A window begins with `bos`, if there is one, in place of its first token."""
    room = len(text) // length
    if count > room:
        raise BadInput(
            f"the text has {len(text)} tokens, and {count} windows of {length} need"
            f" {count * length}; give a longer text, fewer windows or a shorter context"
        )
    found = []
    for at in sorted(Random(seed).sample(range(room), count)):
        window = text[at * length : (at + 1) * length].clone()
        if bos is not None:
            window[0] = bos
        found.append(window)
    return found
