"""How commands write: tables and data to stdout, notes and progress to stderr, files atomically."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dsa_hal.errors import BadInput

WIDE = 240
"""Columns where stdout is no terminal: nothing is wrapped or cut for a file."""

FORMATS = ("table", "json", "csv")

COLOURS = {
    "ok": "green", "absent": "dim", "refused": "yellow", "warning": "yellow",
    "failed": "bold red", "broken": "bold red",
}  # fmt: skip


def note(text: str = "") -> None:
    """A line for the person, on stderr."""
    print(text, file=sys.stderr, flush=True)


def _console(stream: TextIO) -> Console:
    return Console(file=stream, width=None if stream.isatty() else WIDE, highlight=False)


def render(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    right: Sequence[str] = (),
    heading: bool = True,
    terminal: TextIO | None = None,
) -> str:
    """Rows under headings as text for `terminal` (stdout); `right` names the columns of numbers.
    The last column may wrap."""
    made = Table(
        box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0), show_header=heading
    )
    for at, column in enumerate(columns):
        made.add_column(
            column,
            justify="right" if column in right else "left",
            no_wrap=at < len(columns) - 1,
            overflow="fold",
        )
    for row in rows:
        made.add_row(*(Text(str(cell), style=COLOURS.get(str(cell), "")) for cell in row))
    console = _console(terminal or sys.stdout)
    with console.capture() as captured:
        console.print(made)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], **options: Any) -> None:
    """Print rows under headings; options as in `render`."""
    print(render(columns, rows, **options), file=options.get("terminal", sys.stdout))


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, default=str) + "\n"


def as_csv(columns: Sequence[str], records: Sequence[Mapping[str, Any]]) -> str:
    """Records as comma-separated text with a heading; fields that a record lacks stay empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def write_atomically(path: Path, content: str | bytes) -> None:
    """The whole content or nothing: a file beside `path`, synced, then renamed over it.

    Raises BadInput that names the path and the system's reason."""
    beside = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            beside = Path(file.name)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.chmod(0o644)
        beside.replace(path)
    except OSError as error:
        if beside is not None:
            with suppress(OSError):
                beside.unlink()
        raise BadInput(f"cannot write {path}: {error.strerror}") from None


def must_be_writable(path: Path) -> None:
    """Say before long work, and not behind it, that its result cannot be written."""
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        reason = "is a folder" if path.is_dir() else f"{path.parent} is no folder to write to"
        raise BadInput(f"cannot write {path}: {reason}")


def read_text(path: str) -> str:
    """A whole UTF-8 file, "-" for stdin. Raises BadInput that names the path."""
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start})") from None


# -- numbers for people ------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Three digits and the unit that keeps them readable."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 1000 else f"{seconds:.0f} s"
    return f"{seconds / 1e-6:.3g} us"


def number(value: float) -> str:
    """Three significant digits, never in exponents."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{max(digits, 0)}f}"


# -- progress ----------------------------------------------------------------------------------

PATIENCE_S = 2.0
"""Work shorter than this needs no bar."""

LINE_EVERY_S = 10.0
"""Between two progress lines where stderr is no terminal."""


class Step:
    """Call it with (done, total), in any unit, as work advances. A bar on a terminal once the work
    proves long; a line now and then where stderr is no terminal. `close()` takes the bar away."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._last = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __call__(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif not sys.stderr.isatty():
            if time.monotonic() - self._last >= LINE_EVERY_S:
                self._last = time.monotonic()
                note(f"{self._label}: {100 * done // max(total, 1)}%")
        elif time.monotonic() - self._last >= PATIENCE_S:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
                TimeRemainingColumn(), console=_console(sys.stderr), transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(self._label, completed=done, total=total)
            self._bar.start()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def progress(label: str) -> Iterator[Step]:
    """A Step that is closed behind the block."""
    step = Step(label)
    try:
        yield step
    finally:
        step.close()
