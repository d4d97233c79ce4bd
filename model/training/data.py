"""Windows of text to train on.

Which text a window holds follows from the seed and its number alone, so a resumed run only has to
know how many were read. A window begins with the begin-of-text token.
"""

from __future__ import annotations

import random

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsa_hal.errors import BadInput
from dsa_hal.model.quality.needle import draw


class Windows:
    """The training set as an endless sequence of windows of length + 1 ids.

    An epoch is a new cut into windows, from a new offset and in a new order. A share `needles` of
    the windows holds retrieval tasks: statements somewhere, and some of them once more later on.
    """

    def __init__(
        self, tokens: NDArray[np.uint32], length: int, seed: int, *, bos: int,
        needles: float = 0.0, tokenizer: tokenizers.Tokenizer | None = None,
    ) -> None:  # fmt: skip
        if len(tokens) < 2 * length + 2:
            raise BadInput(
                f"the training text has {len(tokens)} tokens; windows of {length} need at least"
                f" {2 * length + 2}"
            )
        self._tokens, self._length, self._seed, self._bos = tokens, length, seed, bos
        self._needles, self._tokenizer = needles, tokenizer
        self._per_epoch = len(tokens) // length - 1
        self._epoch = -1
        self._starts = np.empty(0, np.int64)

    def batch(self, first: int, count: int) -> Tensor:
        """Windows number `first` to `first + count`: int64 [count, length + 1]."""
        rows = np.stack([self._window(at) for at in range(first, first + count)])
        return torch.from_numpy(rows.astype(np.int64))

    def _window(self, number: int) -> NDArray[np.uint32]:
        epoch, at = divmod(number, self._per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, epoch])
            offset = int(rng.integers(self._length))
            self._starts = offset + self._length * rng.permutation(self._per_epoch)
            self._epoch = epoch
        start = int(self._starts[at])
        window = self._tokens[start : start + self._length + 1].copy()
        pick = random.Random(f"{self._seed}/{number}")
        if pick.random() < self._needles:
            window = self._with_needles(window, pick)
        window[0] = self._bos
        return window

    def _with_needles(self, window: NDArray[np.uint32], pick: random.Random) -> NDArray[np.uint32]:
        assert self._tokenizer is not None
        needles = [draw(pick, heldout=False) for _ in range(pick.randint(1, 4))]
        asked = pick.sample(needles, pick.randint(1, len(needles)))
        gap = pick.choice((" ", "\n"))
        texts = [f"{gap}{needle.statement}{gap}" for needle in (*needles, *asked)]
        ids = [e.ids for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]
        inserts = [np.array(i, np.uint32) for i in ids]
        room = len(window) - sum(map(len, inserts))
        if room <= len(inserts):
            return window
        cuts = sorted(pick.sample(range(1, room), len(inserts)))
        pieces = [window[: cuts[0]]]
        for insert, start, stop in zip(inserts, cuts, [*cuts[1:], room], strict=True):
            pieces += [insert, window[start:stop]]
        return np.concatenate(pieces)
