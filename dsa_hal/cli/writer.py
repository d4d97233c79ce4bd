"""Generated tokens to stdout: text in the order of the prompts, or a JSON object per prompt."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from dsa_hal.model.tokenizer import Tokenizer


class Text:
    """Text of several rows that are generated together: the first as it comes, the others behind
    it, each ending in a newline. Nothing is written before `open()`, so that a progress bar is
    gone."""

    def __init__(self, tokenizer: Tokenizer, rows: int) -> None:
        self._streams = [tokenizer.stream() for _ in range(rows)]
        self._held = [""] * rows
        self._is_open = False

    def token(self, row: int, token: int) -> None:
        self._held[row] += self._streams[row].push(token)
        if row == 0:
            self._flush()

    def open(self) -> None:
        self._is_open = True
        self._flush()

    def finish(self) -> None:
        """Write what was held back, characters that never became whole included."""
        self._is_open = True
        for row, stream in enumerate(self._streams):
            self._write(self._held[row] + stream.finish() + "\n")

    def _flush(self) -> None:
        if self._is_open:
            self._write(self._held[0])
            self._held[0] = ""

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()


class JsonLines:
    """A line per prompt once its batch is done: {"prompt", "text", "tokens"}; tokens are ids."""

    def __init__(self, prompts: Sequence[str], tokenizer: Tokenizer) -> None:
        self._prompts, self._tokenizer = prompts, tokenizer
        self._ids: list[list[int]] = [[] for _ in prompts]

    def token(self, row: int, token: int) -> None:
        self._ids[row].append(token)

    def open(self) -> None:
        """Lines are written whole, at the end."""

    def finish(self) -> None:
        for prompt, ids in zip(self._prompts, self._ids, strict=True):
            record = {"prompt": prompt, "text": self._tokenizer.decode(ids), "tokens": ids}
            sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
        sys.stdout.flush()
