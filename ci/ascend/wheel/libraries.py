"""The shared libraries of CANN that the torch_npu wheel cannot be imported without, made here with
gcc: a runtime over host memory (runtime.c), refusals for every other function that the wheel's
libraries want from them, and an operator library (opapi.c) that tells Python what it is asked. Kept
by the hash of all that goes in."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import yaml

from dsa_hal import env

HERE = Path(__file__).parent
ORDER = HERE / "aclnn.yaml"
RUNTIME = "libascendcl.so"
OPERATORS = "libopapi.so"
EMPTY = (
    "libhccl.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
)
"""Wanted by name; what the wheel needs of them is in RUNTIME, which they depend on."""
OURS = re.compile(r"(acl[a-z]*|Msprof|rt)[A-Z]\w*")
"""Undefined symbols of these names are CANN's; all others are the C library's and Python's."""
QUIET = re.compile(r"Msprof\w+|aclAppLog|aclmdl(Init|Finalize)Dump")
"""Called at import or at exit; doing nothing is right. Whatever else has no body here refuses."""


class NoWheel(Exception):
    """The wheel or what is needed to use it is not there."""


def wheel() -> Path:
    """The folder of the installed torch_npu, which is not imported for it."""
    spec = find_spec("torch_npu")
    if spec is None or spec.origin is None:
        raise NoWheel(
            f"{sys.executable} has no torch_npu; run bash ci/ascend/run.sh, which installs it"
        )
    return Path(spec.origin).parent


def folder() -> Path:
    """Where the libraries for the installed wheel are; made on the first call.

    Raises NoWheel where a tool is absent or the compiler refuses.
    """
    home = wheel()
    digest = hashlib.sha256()
    for path in (
        Path(__file__),
        ORDER,
        *sorted(HERE.glob("*.[ch]")),
        *home.parent.glob("torch_npu-*/RECORD"),
    ):
        digest.update(path.read_bytes())
    at = env.CACHE.read() / "cann" / digest.hexdigest()[:32]
    if not at.is_dir():
        at.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=at.parent) as temporary:
            _make(home, Path(temporary))
            try:
                os.rename(temporary, at)
            except OSError:
                if not at.is_dir():  # else another process made the same
                    raise
            else:
                Path(temporary).mkdir()  # for its own clean-up
    return at


@cache
def load() -> ctypes.CDLL:
    """Make the libraries known to this process: the loader then takes them by their names, whatever
    LD_LIBRARY_PATH says. Before torch_npu is imported. Returns the operator library."""
    at = folder()
    for name in (RUNTIME, *EMPTY):
        ctypes.CDLL(str(at / name), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(at / OPERATORS), mode=ctypes.RTLD_GLOBAL)


def operators() -> set[str]:
    """CANN's operators that the library offers: those of aclnn.yaml. torch_npu finds no other."""
    entries = yaml.safe_load(ORDER.read_text()).values()
    return {name for entry in entries for name in (entry["calls"], *entry.get("beside", ()))}


def _make(home: Path, at: Path) -> None:
    wanted = _wanted(home)
    sources = [HERE / "runtime.c"]
    include = f"-I{home / 'include'}"
    given = _symbols("--defined-only", _gcc(at / "bodies.so", *sources, include))
    lines = [
        f"long {name}(void) {{ return {0 if QUIET.fullmatch(name) else 'refuse(__func__)'}; }}"
        for name in sorted(wanted - given)
    ]
    (at / "rest.c").write_text(
        "#include <stdio.h>\n"
        "static long refuse(const char *name)\n"
        '{ fprintf(stderr, "ci/ascend/wheel: %s has no body here\\n", name); return 200001; }\n'
        + "\n".join(lines)
        + "\n"
    )
    runtime = _gcc(at / RUNTIME, *sources, at / "rest.c", include)
    (at / "bodies.so").unlink()
    for name in EMPTY:
        _gcc(at / name, "-Wl,--no-as-needed", runtime)
    (at / "operators.h").write_text("".join(f"ENTRY({name})\n" for name in sorted(operators())))
    _gcc(at / OPERATORS, HERE / "opapi.c", include, f"-I{at}")


def _wanted(home: Path) -> set[str]:
    """What of CANN the wheel's libraries leave undefined."""
    libraries = [
        home / "lib" / f"lib{name}.so" for name in ("torch_npu", "tensorpipe", "npu_profiler")
    ]
    symbols = _symbols("--undefined-only", *libraries, *home.glob("_C*.so"))
    return {symbol for symbol in symbols if OURS.fullmatch(symbol)}


def _symbols(which: str, *libraries: Path) -> set[str]:
    if shutil.which("nm") is None:
        raise NoWheel("nm is not in PATH; install binutils")
    found = subprocess.run(
        ["nm", "-D", which, *map(str, libraries)], check=True, capture_output=True, text=True
    )
    return {words[-1] for line in found.stdout.splitlines() if len(words := line.split()) > 1}


def _gcc(out: Path, *arguments: Path | str) -> Path:
    """`out`, a shared library that is found by its file's name."""
    if shutil.which("gcc") is None:
        raise NoWheel("gcc is not in PATH; install it")
    command = ["gcc", "-std=gnu11", "-O1", "-Wall", "-Wno-unused-parameter", "-fPIC", "-shared"]
    made = subprocess.run(
        [*command, "-o", str(out), f"-Wl,-soname,{out.name}", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        raise NoWheel(f"gcc could not make {out.name}: {made.stderr.strip()}")
    return out
