"""Machine code of a recorded Triton launch, made without a device, and what can be read off it:
registers, shared memory, spills, matrix instructions, size. Results are kept under
$DSA_HAL_CACHE/compiled by the hash of source, constants, options and compiler."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from dsa_hal import env
from dsa_hal.autotune.static import Metrics
from dsa_hal.backends.portable.launches import Launch, gpu

TILE = r"(?:!ttg\.memdesc|tensor)<([\dx]+)x([a-zA-Z]\w*)[,>]"
DOT = re.compile(rf"\b(?:\w+\.dot|\w+\.\w*dot\w*|\w+\.\w*mfma\w*) .*?: {TILE}.*? \* {TILE}")
"""A product of tiles in Triton's own code: shape and dtype of both operands."""

AMD_MEMORY = {
    "read": r"(buffer|global|flat)_load_(?!lds)\w+",
    "write": r"(buffer|global|flat)_store_\w+",
    "atomic": r"(buffer|global|flat|ds)_(atomic_\w+|add\w*|cmpst\w*)",
    "direct": r"(buffer|global)_load_lds_\w+",
    "shared": r"ds_(read|write)\w+",
}
NVIDIA_MEMORY = {
    "read": r"ld\.global.*",
    "write": r"st\.global.*",
    "atomic": r"(atom|red)\..*",
    "direct": r"cp\.async\.c[ag]\..*|cp\.async\.bulk\..*",
    "shared": r"(ld|st)\.shared.*|ldmatrix.*|stmatrix.*",
}
"""Kinds of access -> instructions. "direct" goes from memory to shared memory past registers."""


def metrics(launch: Launch, arch: str) -> Metrics:
    """Compile a launch that was recorded for `arch`, or take what was kept.

    Raises what Triton's compiler raises.
    """
    source, key = _source(launch, arch)
    path = env.CACHE.read() / "compiled" / f"{key}.json"
    if path.is_file():
        return Metrics.of(json.loads(path.read_text()))
    made = read_off(_compiled(source, launch, arch), int(launch.options["num_warps"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        json.dump(asdict(made), file)
    os.replace(temporary, path)
    return made


@cache
def _reader() -> str:
    """Changes with what this file makes of a program."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _source(launch: Launch, arch: str) -> tuple[Any, str]:
    """What Triton compiles, and a name that no other program, compiler or reader has."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import ASTSource, make_backend
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.cache import get_cache_key

    kind = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = kind(launch.kernel, launch.signature, launch.constexprs, launch.attrs)
    backend = make_backend(gpu(arch))
    options = backend.parse_options(dict(launch.options))
    known = get_cache_key(source, backend, options, get_cache_invalidating_env_vars())
    return source, hashlib.sha256(f"{_reader()}{arch}{known}".encode()).hexdigest()


def _compiled(source: Any, launch: Launch, arch: str) -> dict[str, Any]:
    """Every stage of the code by Triton's name for it, and the bytes of shared memory."""
    import triton
    from triton import knobs

    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.cache.scope(),
        knobs.compilation.scope(),
    ):
        knobs.cache.dir, knobs.compilation.always_compile = folder, True
        made = triton.compile(source, target=gpu(arch), options=dict(launch.options))
        return {**made.asm, "shared": made.metadata.shared}


def read_off(code: dict[str, Any], warps: int) -> Metrics:
    """The metrics of a compiled program, by its stages."""
    read = _amd(code["amdgcn"]) if "amdgcn" in code else _nvidia(code["ptx"], code["cubin"])
    dots = {
        f"{left_type}*{right_type} {_sizes(left, right)}"
        for left, left_type, right, right_type in DOT.findall(code.get("ttir") or code["ttgir"])
    }
    return Metrics(**read, warps=warps, shared=int(code["shared"]), dots=tuple(sorted(dots)))


def _sizes(left: str, right: str) -> str:
    """MxNxK of a product of [.., M, K] and [.., K, N]."""
    *_, m, k = left.split("x")
    return f"{m}x{right.rpartition('x')[2]}x{k}"


def _amd(text: str) -> dict[str, Any]:
    """From the assembler's text: its notes, and instructions by name."""

    def noted(name: str) -> int:
        found = re.findall(rf"\.{name}: +(\d+)", text)
        return int(found[0]) if found else 0

    words = Counter(re.findall(r"^\t([a-z]\w+)", text[: text.find(".amdgpu_metadata")], re.M))
    size = re.search(r"; codeLenInByte = (\d+)", text)
    return {
        "registers": noted("vgpr_count"), "accumulators": noted("agpr_count"),
        "scalars": noted("sgpr_count"), "spills": noted("vgpr_spill_count"),
        "scalar_spills": noted("sgpr_spill_count"),
        "scratch": noted("private_segment_fixed_size"), "size": int(size[1]) if size else 0,
        "matrix": _matching(words, r"v_s?mfmac?_\w+"), "memory": _kinds(words, AMD_MEMORY),
    }  # fmt: skip


def _nvidia(text: str, binary: bytes) -> dict[str, Any]:
    """Instructions by name from PTX, where the assembler changes no dtype of theirs; the rest from
    the tool that lies beside Triton's compiler."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        told = subprocess.run(
            [tool, "-res-usage", "-elf", file.name], check=True, capture_output=True, text=True
        ).stdout
    used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}
    sizes = re.findall(r"^ +\w+ +\w+ +(\w+) .* PROGBITS .*\.text\.", told, re.M)
    words = Counter(re.findall(r"^\s*(?:@%?!?\w+ )?([a-z][\w.:]*)", text, re.M))
    names = Counter[str]()
    for word, count in words.items():
        short = re.sub(r"\.(mma_async|sync|aligned|row|col|satfinite)\b", "", word)
        names[short] += count
    stack = used["STACK"] + used["LOCAL"]
    return {
        "registers": used["REG"], "accumulators": 0, "scalars": 0, "spills": -(-stack // 4),
        "scalar_spills": 0, "scratch": stack, "size": sum(int(size, 16) for size in sizes),
        "matrix": _matching(names, r"w?g?mma\.m\d.*"), "memory": _kinds(words, NVIDIA_MEMORY),
    }  # fmt: skip


def _matching(words: Counter[str], pattern: str) -> dict[str, int]:
    return {word: words[word] for word in sorted(words) if re.fullmatch(pattern, word)}


def _kinds(words: Counter[str], kinds: dict[str, str]) -> dict[str, int]:
    counts = {kind: sum(_matching(words, pattern).values()) for kind, pattern in kinds.items()}
    return {kind: count for kind, count in counts.items() if count}
