"""`dsa-hal` driven as a process, cheaply: a server imports dsa_hal once and forks for every
command.

Each command has file descriptors, environment, limits and an exit code of its own; only the seconds
that importing torch takes are shared. Run as a script, this file is the server.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Done:
    """What a finished command left."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one sentence of a request that is refused, with all that such an end promises."""
        assert self.code == 2, f"exit code {self.code}\n{self.err}"
        assert "Traceback" not in self.err, self.err
        errors = [line for line in self.err.splitlines() if "error:" in line]
        assert len(errors) == 1, self.err
        assert self.out == ""
        return errors[0]


def environment(**more: str) -> dict[str, str]:
    """This process's environment and `more`: the package is found as it is here, and one thread
    computes, for the work is tiny."""
    import dsa_hal

    home = str(Path(dsa_hal.__file__).parents[1])
    path = os.pathsep.join([home, *sys.path])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


class Server:
    """`Server()(*arguments)` runs one command line and waits for it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def __call__(
        self, *arguments: object, stdin: str = "", file_limit: int | None = None, **env: str
    ) -> Done:
        """`file_limit` is the size in bytes at which a written file hits the end of its room."""
        with tempfile.TemporaryDirectory() as folder:
            files = {name: str(Path(folder) / name) for name in ("stdin", "stdout", "stderr")}
            Path(files["stdin"]).write_text(stdin)
            request = dict(arguments=list(map(str, arguments)), env=env, limit=file_limit, **files)
            assert self._process.stdin is not None and self._process.stdout is not None
            print(json.dumps(request), file=self._process.stdin, flush=True)
            code = int(self._process.stdout.readline())
            out, err = (Path(files[name]).read_text() for name in ("stdout", "stderr"))
        return Done(code, out, err)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()


def serve() -> None:
    from dsa_hal.cli import COMMANDS
    from dsa_hal.selection import OPS

    for name in COMMANDS:
        importlib.import_module(f"dsa_hal.cli.{name}")
    for op in OPS.values():  # torch imports seconds' worth of itself at the first meta tensors
        op.cases[0].make(op.inputs, "meta")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_command(request))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _command(request: dict[str, Any]) -> int:
    """In the child: become the command; return what a process of its own would exit with."""
    import resource
    import traceback

    from dsa_hal.cli import main

    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        flags = os.O_RDWR | (os.O_CREAT if fd else 0)
        os.dup2(os.open(request[name], flags, 0o600), fd)
    sys.stdin = os.fdopen(0, closefd=False)
    os.environ.update(request["env"])
    if request["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    try:
        code = main(request["arguments"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve()
