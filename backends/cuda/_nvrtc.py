"""CUDA C++ kernels, compiled when first launched: NVRTC makes machine code for the device present,
the driver loads it, and a launch goes to torch's current stream.

    module = _nvrtc.module("topk.cu", defines=(("K", 2048),))
    module.launch("select", (rows,), (512,), (logits, out, logits.stride(0), n), shared=65536)

A source lies in `_kernels/`, exports its kernels as extern "C", and may include other files of that
folder. NVRTC brings no <cstdint>: write `unsigned`, `long long`. CUDA's own headers (cuda_bf16.h)
are found where a toolkit's wheel installed them.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import re
import struct
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsa_hal import env
from dsa_hal.errors import Absent

KERNELS = Path(__file__).parent / "_kernels"
NEEDS = ("cuda-bindings>=12.9.1",)
"""What an implementation that launches through this file states in `needs`."""

DEFAULT_SHARED = 48 << 10
"""Bytes of dynamic shared memory that a kernel has without asking."""

REMEMBERED = 4096
"""Launch configurations kept per kernel before the memory is emptied: grids follow batch sizes."""


@cache
def available() -> str | None:
    """Why kernels cannot be compiled and launched in this process; None if they can."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch finds no CUDA device; check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
    try:
        _compiler()
    except Absent as error:
        return str(error)
    return None


@cache
def module(source: str, defines: tuple[tuple[str, int], ...] = ()) -> Module:
    """The kernels of `_kernels/<source>` with these macros defined. Nothing is compiled before the
    first launch."""
    return Module(source, defines)


class Module:
    """One source under one set of macros; its kernels by name, on every device of the process."""

    def __init__(self, source: str, defines: tuple[tuple[str, int], ...]) -> None:
        self.source, self.defines = source, defines
        self._kernels: dict[tuple[str, int], Kernel] = {}
        self._libraries: dict[int, Any] = {}
        self._lock = threading.Lock()

    def kernel(self, name: str, device: int) -> Kernel:
        """A kernel, ready to launch on a device; compiles the source on its first call."""
        try:
            return self._kernels[name, device]
        except KeyError:
            pass
        with self._lock, torch.cuda.device(device):
            _enter(device)
            if device not in self._libraries:
                code = compiled(self.source, self.defines, architecture(device))
                self._libraries[device] = _loaded(code)
            made = Kernel(self._libraries[device], name, device)
            return self._kernels.setdefault((name, device), made)

    def launch(
        self, name: str, grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], *,
        shared: int = 0, cluster: tuple[int, ...] | None = None, overlap: bool = False,
    ) -> None:  # fmt: skip
        """Launch `name` on the current stream of the device of the first tensor in `args`.

        grid, block, cluster  one to three sizes
        args                  as the kernel's parameters: tensors (their address), whole numbers,
                              floats, or bytes (a `tensor_map`, a struct) of the parameter's size
        shared                bytes of dynamic shared memory
        overlap               blocks may begin while the kernel ahead on the stream still runs, once
                              each of its blocks has ended or called `launch_dependents`. Every
                              thread that reads or writes global memory of another kernel calls
                              `griddepcontrol.wait` first, which returns when that kernel has ended
        """
        device = next(a.device.index for a in args if isinstance(a, Tensor))
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.kernel(name, device).launch(grid, block, args, shared, cluster, overlap)
        return self.kernel(name, device).launch(grid, block, args, shared, cluster, overlap)


class Kernel:
    """One function of a loaded library on one device, with the layout of its parameters."""

    def __init__(self, library: Any, name: str, device: int) -> None:
        from cuda.bindings import driver

        self._driver, self.name, self._index = driver, name, device
        self._kernel = _checked(driver.cuLibraryGetKernel(library, name.encode()), name)
        self._device = _checked(driver.cuDeviceGet(device), name)
        self._function = driver.CUfunction(int(self._kernel))
        self._layout: list[tuple[int, int]] = []
        while True:
            error, *where = driver.cuKernelGetParamInfo(self._kernel, len(self._layout))
            if error != driver.CUresult.CUDA_SUCCESS:  # past the last parameter
                break
            self._layout.append((where[0], where[1]))
        self._frames: list[Frame] = []
        self._configs: dict[Any, Any] = {}

    def launch(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], shared: int,
        cluster: tuple[int, ...] | None, overlap: bool = False,
    ) -> None:  # fmt: skip
        stream = _stream(self._index)
        key = (grid, block, shared, cluster, overlap, stream)
        config = self._configs.get(key)
        if config is None:
            if len(self._configs) >= REMEMBERED:
                self._configs.clear()
            made = self._configured(grid, block, shared, cluster, overlap, stream)
            config = self._configs.setdefault(key, made)
        try:  # a frame of its own for each thread that is here at the same time
            frame = self._frames.pop()
        except IndexError:
            frame = Frame(self.name, self._layout)
        pointers = frame.fill(args)
        (error,) = self._driver.cuLaunchKernelEx(config, self._function, pointers, 0)
        if error == self._driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            _enter(self._index)
            (error,) = self._driver.cuLaunchKernelEx(config, self._function, pointers, 0)
        self._frames.append(frame)
        if error:
            raise RuntimeError(
                f"launching {self.name} failed with {error.name}: grid {grid}, block {block},"
                f" {shared} bytes of shared memory, cluster {cluster}"
            )

    def _configured(
        self, grid: tuple[int, ...], block: tuple[int, ...], shared: int,
        cluster: tuple[int, ...] | None, overlap: bool, stream: int,
    ) -> Any:  # fmt: skip
        driver = self._driver
        if shared > DEFAULT_SHARED:
            at = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            held = _checked(driver.cuKernelGetAttribute(at, self._kernel, self._device), self.name)
            if held < shared:
                answer = driver.cuKernelSetAttribute(at, shared, self._kernel, self._device)
                _checked(answer, f"{self.name} with {shared} bytes of shared memory")
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = (*block, 1, 1)[:3]
        config.sharedMemBytes, config.hStream = shared, stream
        attributes = []
        if cluster is not None:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            size = attribute.value.clusterDim
            size.x, size.y, size.z = (*cluster, 1, 1)[:3]
            attributes.append(attribute)
        if overlap:
            attribute = driver.CUlaunchAttribute()
            kinds = driver.CUlaunchAttributeID
            attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if attributes:
            config.attrs, config.numAttrs = attributes, len(attributes)
        return config


def _enter(device: int) -> None:
    """Give this thread the context that torch uses; a new thread has none before its first call
    of the runtime."""
    from cuda.bindings import driver

    if not int(_checked(driver.cuCtxGetCurrent(), "asking for a context")):
        context = _checked(driver.cuDevicePrimaryCtxRetain(device), "taking a context")
        _checked(driver.cuCtxSetCurrent(context), "entering a context")


def _slow_stream(device: int) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


# What Triton asks as well: the public way makes an object, which takes a third of a launch's time.
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _slow_stream)


class Frame:
    """Host memory for the parameters of one launch, and the array of their addresses."""

    def __init__(self, name: str, layout: Sequence[tuple[int, int]]) -> None:
        self.name, self.layout = name, layout
        size = max((offset + size for offset, size in layout), default=1)
        self.memory = ctypes.create_string_buffer(size)
        base = ctypes.addressof(self.memory)
        self.pointers = (ctypes.c_void_p * max(1, len(layout)))(*(base + at for at, _ in layout))
        self.address = ctypes.addressof(self.pointers)

    def fill(self, args: Sequence[Any]) -> int:
        """Write `args` into the parameters' places; the address that the driver wants."""
        if len(args) != len(self.layout):
            raise TypeError(f"{self.name} takes {len(self.layout)} parameters, not {len(args)}")
        memory = self.memory
        for value, (offset, size) in zip(args, self.layout, strict=True):
            if isinstance(value, Tensor):
                if size != 8 or not value.is_cuda:  # host memory would be an illegal access
                    raise TypeError(
                        f"{self.name}: a tensor on {value.device} for a parameter of {size} bytes"
                    )
                _POINTER.pack_into(memory, offset, value.data_ptr())
            elif isinstance(value, int):
                _WHOLE[size].pack_into(memory, offset, value)
            elif isinstance(value, float):
                _REAL[size].pack_into(memory, offset, value)
            else:
                if len(value) != size:
                    raise TypeError(f"{self.name}: {len(value)} bytes for a parameter of {size}")
                memory[offset : offset + size] = value
        return self.address


def address(t: Tensor | None) -> int:
    """Where a tensor begins on its GPU, for a struct that a kernel reads; 0 for none. Raises
    TypeError for one in host memory, which a kernel could not read."""
    if t is None:
        return 0
    if not t.is_cuda:
        raise TypeError(f"a tensor of shape {list(t.shape)} is on {t.device}, not on a GPU")
    return t.data_ptr()


_POINTER = struct.Struct("<Q")
_WHOLE = {
    size: struct.Struct(f"<{code}") for size, code in ((1, "b"), (2, "h"), (4, "i"), (8, "q"))
}
_REAL = {4: struct.Struct("<f"), 8: struct.Struct("<d")}


# -- compiling ----------------------------------------------------------------------------------


def architecture(device: int) -> str:
    """What NVRTC calls a device: "sm_90a" on Hopper, whose own instructions need the "a"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def compiled(source: str, defines: tuple[tuple[str, int], ...], arch: str) -> bytes:
    """Machine code of a source; from this user's cache if it was compiled before.

    Raises Absent where NVRTC is missing, RuntimeError with the compiler's log where it refuses.
    """
    nvrtc, major, minor = _compiler()
    text = (KERNELS / source).read_text()
    options = [f"--gpu-architecture={arch}", "--std=c++17", f"--include-path={KERNELS}"]
    options += [f"--include-path={folder}" for folder in _headers()]
    options += [f"--define-macro={name}={value}" for name, value in defines]
    parts = (*_texts(source), *options[:2], repr(defines), arch, f"{major}.{minor}")
    at = env.CACHE.read() / "nvrtc" / f"{_digest(chr(0).join(parts).encode())}.cubin"
    if (kept := _kept(at)) is not None:
        return kept
    program = _checked(nvrtc.nvrtcCreateProgram(text.encode(), source.encode(), 0, [], []), source)
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    if error:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program), source)
        nvrtc.nvrtcGetProgramLog(program, log)
        text = log.decode(errors="replace").strip("\0 \n")
        raise RuntimeError(f"NVRTC {major}.{minor} refused {source} for {arch}:\n{text}")
    code = b" " * int(_checked(nvrtc.nvrtcGetCUBINSize(program), source))
    _checked(nvrtc.nvrtcGetCUBIN(program, code), source)
    nvrtc.nvrtcDestroyProgram(program)
    _keep(at, code)
    return code


@cache
def _compiler() -> tuple[Any, int, int]:
    """NVRTC's binding and version; raises Absent where either half is missing."""
    try:
        from cuda import pathfinder
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
        library = Path(pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path).resolve()
    except (ImportError, RuntimeError) as error:  # no package, or no library for it
        raise Absent(
            f"CUDA C++ needs cuda-bindings and NVRTC, which failed with {error!r};"
            " pip install cuda-bindings nvidia-cuda-nvrtc"
        ) from None
    # NVRTC looks for this half of itself by name alone, in vain where both lie in a wheel.
    half = library.with_name(f"libnvrtc-builtins.so.{major}.{minor}")
    if half.exists():
        ctypes.CDLL(str(half))
    return nvrtc, major, minor


def _texts(source: str, seen: tuple[str, ...] = ()) -> list[str]:
    """A source and, in order, the files of its folder that it includes, each once."""
    text = (KERNELS / source).read_text()
    texts = [text]
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.M):
        if name not in seen:
            texts += _texts(name, (*seen, source))
    return texts


@cache
def _headers() -> tuple[str, ...]:
    """Folders of CUDA's headers among the installed wheels; their place differs by release."""
    spec = importlib.util.find_spec("nvidia")
    homes = list(spec.submodule_search_locations or ()) if spec is not None else []
    known = [Path(home) / part / "include" for home in homes for part in ("cu13", "cuda_runtime")]
    return tuple(str(folder) for folder in known if (folder / "cuda_bf16.h").exists())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _kept(at: Path) -> bytes | None:
    """Machine code from the cache, where every file begins with the digest of what follows."""
    try:
        digest, code = (data := at.read_bytes())[:64], data[64:]
    except OSError:
        return None
    return code if digest.decode(errors="replace") == _digest(code) else None


def _keep(at: Path, code: bytes) -> None:
    # A folder that cannot be written costs the next process a second of compiling, nothing else.
    with contextlib.suppress(OSError):
        at.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=at.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(_digest(code).encode() + code)
        os.replace(temporary, at)


def _loaded(code: bytes) -> Any:
    from cuda.bindings import driver

    return _checked(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0), "loading machine code")


def _checked(answer: tuple[Any, ...], what: str) -> Any:
    """The value in a binding's answer (error, value...), or RuntimeError naming the error."""
    error, *values = answer
    if error:
        raise RuntimeError(f"{what}: {error.name}")
    return values[0] if values else None


# -- tensor maps --------------------------------------------------------------------------------

_KINDS = {
    torch.uint8: 0, torch.float8_e4m3fn: 0, torch.int32: 4, torch.float16: 6, torch.float32: 7,
    torch.bfloat16: 9,
}  # fmt: skip
"""CUtensorMapDataType by torch's."""

_ONES = struct.pack("5I", 1, 1, 1, 1, 1)
"""Steps between the elements that a copy takes along each axis."""

SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
"""CUtensorMapSwizzle by the bytes of its row."""


def tensor_map(t: Tensor, box: Sequence[int], *, swizzle: int = 0) -> bytes:
    """What the copy engine must know of a tensor; an argument for a `const __grid_constant__`
    parameter of 128 bytes, alignas(64).

    t        [rows, columns] or with more axes, last axis dense; every other stride a multiple of 16
             bytes, the address too. Elements out of bounds are read as zeros
    box      elements that one copy moves along each axis of t, last axis last
    swizzle  0, 32, 64 or 128: bytes within which 16-byte pieces change places
    """
    size, rank = t.element_size(), t.dim()
    strides = [s * size for s in t.stride()]
    address = t.data_ptr()
    if strides.pop() != size or address % 16 or any(s % 16 for s in strides):
        raise ValueError(
            f"tensor of shape {list(t.shape)}, strides {list(t.stride())} cannot be tiled:"
            " its last axis must be dense and other strides multiples of 16 bytes"
        )
    made = ctypes.create_string_buffer(192)  # 128 bytes that begin at a multiple of 64
    place = -(-ctypes.addressof(made) // 64) * 64
    error = _encoder()(
        place, _KINDS[t.dtype], rank, address,
        struct.pack(f"{rank}Q", *reversed(t.shape)),
        struct.pack(f"{rank - 1}Q", *reversed(strides)),
        struct.pack(f"{rank}I", *reversed(box)),
        _ONES,
        0, SWIZZLES[swizzle], 2, 0,
    )  # fmt: skip
    if error:
        raise ValueError(
            f"no tensor map of shape {list(t.shape)}, box {list(box)}, swizzle {swizzle}:"
            f" CUDA error {error}"
        )
    return ctypes.string_at(place, 128)


@cache
def _encoder() -> Any:
    """The driver's cuTensorMapEncodeTiled. Called without the binding, which would box each size in
    an object of its own: maps hold addresses, so they are made at every launch."""
    from cuda.bindings import driver

    flags = driver.CUdriverProcAddress_flags.CU_GET_PROC_ADDRESS_DEFAULT
    answer = driver.cuGetProcAddress(b"cuTensorMapEncodeTiled", 12000, flags)
    address = _checked(answer, "cuTensorMapEncodeTiled")
    pointer, whole = ctypes.c_void_p, ctypes.c_int
    kinds = (pointer, whole, ctypes.c_uint32, pointer, *[pointer] * 4, whole, whole, whole, whole)
    return ctypes.CFUNCTYPE(whole, *kinds)(address)
