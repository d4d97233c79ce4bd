"""Which Triton programs a call would launch: inside `recorded`, Triton's launcher notes what its
compiler would have been given, and nothing is compiled or run. Tensors may lie on "meta"; no device
is wanted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from dsa_hal.errors import Absent


@dataclass(frozen=True)
class Launch:
    """One launch, as Triton's compiler would be given it.

    kernel      Triton's function object
    signature   parameter -> type ("*fp8e4nv", "i32", "constexpr")
    constexprs  path of a parameter -> value
    attrs       path of a parameter -> what is known of its value: divisible by 16, within 2 GB
    options     warps, stages and whatever else the target's compiler takes
    grid        programs, up to three sizes
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[tuple[int, ...], Any]
    attrs: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return name_of(self.kernel)

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    def constants(self) -> dict[str, str]:
        """Parameter -> value in words, of those that are compiled in."""
        names = list(self.signature)
        return {
            ".".join((names[path[0]], *map(str, path[1:]))): _words(value)
            for path, value in sorted(self.constexprs.items())
        }

    def key(self) -> tuple[Any, ...]:
        """Equal for launches that run the same program."""
        known = tuple((path, str(value)) for path, value in sorted(self.attrs.items()))
        options = tuple((name, str(value)) for name, value in sorted(self.options.items()))
        constants = tuple(self.constants().items())
        return self.name, tuple(self.signature.items()), constants, known, options


def name_of(kernel: Any) -> str:
    """Module and function, as in "gemm.fp8_gemm"; of a backend's own kernels, the backend too."""
    home, _, module = kernel.__module__.rpartition(".")
    backend = home.removesuffix("._kernels").rpartition(".")[2] if "._kernels" in home else ""
    own = f"{backend}." if backend not in ("", "portable") else ""
    return f"{own}{module}.{kernel.__name__}"


def _words(value: Any) -> str:
    return getattr(value, "__name__", None) or str(value)


def gpu(arch: str) -> Any:
    """Triton's name of an architecture: of "gfx950", "gfx942", "sm90"."""
    from triton.backends.compiler import GPUTarget

    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm")), 32)


@contextmanager
def recorded(arch: str) -> Iterator[list[Launch]]:
    """Inside the block every launch of Triton or Gluon is appended to the list, as it would be for
    `arch`, and does nothing else. Not for several threads at once.

    Raises Absent where Triton is not installed or interprets.
    """
    try:
        from triton import knobs
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction
    except ImportError as error:
        raise Absent(f"Triton cannot be imported ({error}); install triton>=3.6") from None
    if knobs.runtime.interpret:
        raise Absent("TRITON_INTERPRET is set, under which nothing is compiled; unset it")
    found: list[Launch] = []
    grids: list[tuple[int, ...]] = []
    launch, target = JITFunction.run, gpu(arch)
    nowhere = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: f"recorded {arch}",  # Triton keeps one binder per device
        get_current_stream=lambda device: 0,
    )

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if callable(grid):
            own = {name: kwargs[name] for name in kwargs.keys() & self.signature.parameters.keys()}
            bound = self.signature.bind_partial(*args, **own)
            bound.apply_defaults()
            grid = grid(bound.arguments)
        grids.append(tuple(grid))
        launch(self, *args, grid=grid, warmup=warmup, **kwargs)

    def compiling(
        self: Any, key: Any, signature: Any, device: Any, constexprs: Any, options: Any, attrs: Any,
        warmup: bool,
    ) -> None:  # fmt: skip
        options = {name: value for name, value in options.__dict__.items() if value is not None}
        found.append(Launch(self, signature, constexprs, attrs, options, grids.pop()))

    active = driver._active
    with (
        patch.object(JITFunction, "run", run),
        patch.object(JITFunction, "_do_compile", compiling),
    ):
        driver.set_active(nowhere)
        try:
            yield found
        finally:
            driver._active = active
