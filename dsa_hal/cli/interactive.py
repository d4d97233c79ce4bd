"""A conversation at the terminal: every turn sees the turns before it."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from dsa_hal.cli import output
from dsa_hal.cli.session import Session, Work
from dsa_hal.cli.writer import Text
from dsa_hal.errors import BadInput
from dsa_hal.model.generate import Memory
from dsa_hal.model.tokenizer import Tokenizer

ASK = "> "
NEW = "/new"


class _Answer(Text):
    """Text that also keeps what it wrote."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, 1)
        self.ids: list[int] = []

    def token(self, row: int, token: int) -> None:
        self.ids.append(token)
        super().token(row, token)


def converse(session: Session) -> None:
    """Read lines and answer them until the input ends. Ctrl-C ends an answer, not the
    conversation; a turn that no longer fits is refused and forgotten, the conversation stays."""
    if importlib.util.find_spec("readline") is not None:
        importlib.import_module("readline")  # gives input() line editing and history
    output.note(f"Ctrl-D ends, Ctrl-C cuts an answer short, {NEW} forgets what was said")
    turns: list[dict[str, str]] = []
    text = ""
    work, memory = Work(), Memory()
    while (line := _line()) is not None:
        if line.strip() == NEW:
            turns, text, memory = [], "", Memory()
        if line.strip() in ("", NEW):
            continue
        asked = [*turns, {"role": "user", "content": line}]
        try:
            prompt = session.encode_turns(asked, text + line, "the conversation")
        except BadInput as error:
            output.note(f"{error}; {NEW} starts over")
            continue
        answer = _Answer(session.tokenizer)
        try:
            work += session.generate([prompt], answer, memory=memory)
        except KeyboardInterrupt:
            answer.finish()
        said = session.tokenizer.decode(answer.ids)
        turns = [*asked, {"role": "assistant", "content": said}]
        text += line + said
    output.note(str(work))


def _line() -> str | None:
    """The next line, None at the end. What asks for it stays out of a redirected stdout."""
    mark = ASK if sys.stdin.isatty() and sys.stdout.isatty() else ""
    if not mark:
        print(ASK, end="", file=sys.stderr, flush=True)
    try:
        return input(mark)
    except EOFError:
        output.note()
        return None
