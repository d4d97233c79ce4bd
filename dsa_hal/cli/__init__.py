"""`dsa-hal`: one program, a file per command; a command's file is imported when it runs.

Exit codes: 0 done; 1 a check failed; 2 the request or what it names is wrong (one sentence says
what); 130 interrupted. Results go to stdout, all else to stderr. An unexpected exception is a bug
and keeps its traceback.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from dsa_hal.errors import DsaHalError
from dsa_hal.version import __version__

PROGRAM = "dsa-hal"

COMMANDS = {
    "generate": "text from a checkpoint, or from the small built-in model",
    "train": "a model by the paper's stages, from one YAML file",
    "convert": "a Hugging Face checkpoint into the demo's format",
    "doctor": "what is installed here, which devices are seen, and whether the ops work",
    "support": "which implementation serves which case of which op",
    "explain": "why an op is served by what serves it",
    "test": "judge implementations against the references on this device",
    "bench": "time implementations side by side, each checked first",
    "tune": "measure what is fastest on this device, and keep it for later calls",
    "report": "what the sparse attention costs in quality and in time, as tables and pictures",
}

WRONG_REQUEST, INTERRUPTED, PIPE_CLOSED = 2, 130, 141


class Parser(argparse.ArgumentParser):
    """Argparse whose usage errors are one line, like every other error of this program."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_REQUEST, f"{PROGRAM}: error: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(words)
        sys.stdout.flush()
    except DsaHalError as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG_REQUEST
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    return code


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview(), file=sys.stdout if words else sys.stderr)
        return 0 if words else WRONG_REQUEST
    if words[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    name = words[0]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {close[0]}" if close else f"known are {', '.join(COMMANDS)}"
        Parser(prog=PROGRAM).error(f"unknown command {name!r}; {hint}")
    command = importlib.import_module(f"dsa_hal.cli.{name}")
    parser = Parser(
        prog=f"{PROGRAM} {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.arguments(parser)
    code: int = command.run(parser.parse_intermixed_args(words[1:]))
    return code


def _overview() -> str:
    lines = [
        f"usage: {PROGRAM} COMMAND ...",
        "",
        f"{PROGRAM} {__version__}: DeepSeek Sparse Attention",
    ]
    lines[-1] += " on whatever device is there"
    lines += ["", "commands:", *(f"  {name:<10} {line}" for name, line in COMMANDS.items())]
    lines += [
        "",
        f"{PROGRAM} COMMAND --help tells a command's options; DSA_HAL_BACKEND and the other",
    ]
    return "\n".join([*lines, f"variables are listed by `{PROGRAM} doctor`."])
