"""Files of text, and their tokens in one row: what training learns from and reports judge by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsa_hal.errors import BadInput
from dsa_hal.model.tokenizer import Tokenizer

_DOCUMENTS = 256
"""Documents tokenised at a time."""


def documents(path: Path) -> Iterator[str]:
    """The texts of a `.jsonl` file of {"text": ...}, or the one text of any other file."""
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix != ".jsonl":
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                try:
                    text = json.loads(line)["text"]
                except (ValueError, TypeError, KeyError):
                    text = None
                if not isinstance(text, str):
                    raise BadInput(f'{path}, line {number}: expected an object {{"text": "..."}}')
                yield text
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as text: {error}") from None


def tokenised(path: Path, tokenizer: Tokenizer) -> NDArray[np.uint32]:
    """All documents of a file as one row of ids, each after the begin-of-text token, if there is
    one. BadInput where the file cannot be read."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    parts: list[NDArray[np.uint32]] = []
    batch: list[str] = []

    def flush() -> None:
        for encoding in tokenizer.core.encode_batch_fast(batch, add_special_tokens=False):
            parts.append(np.array([*begin, *encoding.ids], dtype=np.uint32))
        batch.clear()

    for text in documents(path):
        batch.append(text)
        if len(batch) == _DOCUMENTS:
            flush()
    flush()
    return np.concatenate(parts) if parts else np.empty(0, np.uint32)
