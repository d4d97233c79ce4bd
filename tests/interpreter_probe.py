"""A process of its own whose Triton programs are interpreted, for `test_interpreter.py`. It reads a
request in JSON from its standard input and answers in JSON.

corrected  whether dsa_hal's corrections are in force
mutant     [topic, before, after]: the portable kernels of a topic, their text changed in one place
rows       [op, implementation, case] to judge on `target`
numbers    whether to try the small programs below
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

BF16, FP8, FNUZ = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz
PROGRAMS = """
import triton
import triton.language as tl

@triton.jit
def product(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))

@triton.jit
def loop(x, out, count, N: tl.constexpr):
    at = tl.arange(0, N)
    total = tl.zeros((N,), tl.float32)
    for step in range(0, count):
        total += tl.load(x + step * N + at).to(tl.float32)
    tl.store(out + at, total)

@triton.jit
def arithmetic(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, tl.maximum(a * b - a, b))

@triton.jit
def clamped(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.clamp(tl.load(x + at), -1.0, 2.0))

@triton.jit
def conversion(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))

@triton.jit
def larger(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.maximum(tl.load(x + at), tl.load(y + at)))

@triton.jit
def behind(x, out, size, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at, mask=at < size))

@triton.jit
def last(out):
    tl.store(out, tl.program_id(0))
"""


def programs() -> ModuleType:
    """PROGRAMS as a module: Triton reads its functions' source from a file."""
    return loaded("programs", PROGRAMS)


def loaded(name: str, text: str) -> ModuleType:
    folder = tempfile.mkdtemp()
    path = Path(folder) / f"{name.rpartition('.')[2]}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def worst(got: Tensor, want: Tensor) -> float:
    """The largest error, relative to the largest wanted; infinite where NaN stand elsewhere."""
    got, want = got.double(), want.double()
    if not torch.equal(got.isnan(), want.isnan()):
        return float("inf")
    return float((got - want).nan_to_num(0).abs().max() / want.nan_to_num(0).abs().max())


def numbers() -> dict[str, float | str]:
    """How far each small program is from torch, or what it raised."""
    run = programs()
    found: dict[str, float | str] = {}
    make = torch.Generator().manual_seed(0)
    square = [torch.randn(32, 32, generator=make) for _ in range(2)]
    line = torch.randn(4096, generator=make) * 100
    codes = torch.arange(256, dtype=torch.uint8)

    def attempt(name: str, program: str, want: Tensor, *given: Any, size: int = 0) -> None:
        """Run a program on `given`, tensors before its result and numbers behind it, in blocks of
        `size`, or of its first tensor's."""
        out = torch.zeros_like(want)
        tensors = [value for value in given if isinstance(value, Tensor)]
        others = [value for value in given if not isinstance(value, Tensor)]
        try:
            getattr(run, program)[(1,)](*tensors, out, *others, N=size or tensors[0].numel())
            found[name] = worst(out, want)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    for dtype in (torch.float16, BF16, FP8, FNUZ, torch.float8_e5m2, torch.float32):
        a, b = (t.to(dtype) for t in square)
        want = (a.double() @ b.double()).float()
        attempt(f"product {dtype}", "product", want, a, b, size=32)
    x, y = line.to(BF16), line.flip(0).to(BF16)
    attempt("loop", "loop", line.view(4, -1).sum(0), line, 4, size=1024)
    attempt("arithmetic", "arithmetic", torch.maximum((x * y).sub(x), y), x, y)
    hole = torch.where(x > 100, torch.nan, x)
    attempt("clamp", "clamped", hole.nan_to_num(-1.0).clamp(-1, 2), hole)
    attempt("sum of bf16", "loop", x.view(4, -1).float().sum(0), x, 4, size=1024)
    attempt("to bf16", "conversion", x, line)
    attempt("to fp8", "conversion", line.to(FP8), line)
    attempt("from fp8", "conversion", codes.view(FP8).float(), codes.view(FP8))
    some = torch.tensor([float("nan"), 1.0, float("nan"), -3.0])
    attempt("larger than NaN", "larger", torch.fmax(some, some.flip(0)), some, some.flip(0))
    return found


def strictness() -> dict[str, Any]:
    """What the corrected interpreter makes of carelessness."""
    from dsa_hal.backends.portable import interpreter

    run, found = programs(), {}
    out = torch.zeros(8)
    run.behind[(1,)](torch.ones(8), out, 6, N=8)
    found["masked load"] = out.isnan().sum().item()
    try:
        run.behind[(1,)](torch.ones(7), out, 8, N=8)
        found["outside"] = ""
    except Exception as error:
        found["outside"] = str(error)
    order = torch.zeros(1, dtype=torch.int32)
    run.last[(5,)](order)
    found["last forwards"] = order.item()
    with interpreter.backwards():
        run.last[(5,)](order)
    found["last backwards"] = order.item()
    return found


def judged(request: dict[str, Any]) -> list[list[str]]:
    from dsa_hal.backends.portable import interpreter
    from dsa_hal.matrix import Row, attempt, judge_at_once
    from dsa_hal.selection import OPS, use
    from dsa_hal.target import stand_in

    outcomes = []
    with use(target=stand_in(request["target"], "cpu")) as chosen:
        for op_name, impl_name, case_name in request["rows"]:
            op = OPS[op_name]
            impl = next(i for i in op.implementations(chosen.target) if i.name == impl_name)
            case = next(c for c in op.cases if c.name == case_name)
            found = attempt(
                Row(op, impl, case), how=lambda row: judge_at_once(row, interpreter.backwards)
            )
            outcomes.append([found.status, found.detail])
    return outcomes


def main() -> None:
    request = json.load(sys.stdin)
    os.environ["TRITON_INTERPRET"] = "1"
    np.seterr(all="ignore")
    torch.set_num_threads(1)
    if request["corrected"]:
        from dsa_hal.backends.portable import interpreter

        interpreter.start()
    answer: dict[str, Any] = {}
    if request.get("numbers"):
        answer["numbers"] = numbers()
        if request["corrected"]:
            answer["strictness"] = strictness()
    if request.get("mutant"):
        topic, before, after = request["mutant"]
        name = f"dsa_hal.backends.portable._kernels.{topic}"
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        text = Path(spec.origin).read_text()
        assert before in text, f"{before!r} is no longer in {topic}"
        loaded(name, text.replace(before, after, 1))
    if request.get("rows"):
        answer["rows"] = judged(request)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
