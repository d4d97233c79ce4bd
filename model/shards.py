"""Safetensors files at the level of bytes: what a header promises, and writing that cannot tear.

Tensors themselves are read through the safetensors library. Headers are parsed here because a
checkpoint is verified, and named in errors, before any weight is touched, and because a shard is
written as a stream.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dsa_hal.errors import CheckpointError

_MAX_HEADER = 100_000_000
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """One tensor as a header states it; `dtype` in the format's words."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Header:
    path: Path
    entries: dict[str, Entry]
    digest: str
    """sha256 of the header's own bytes."""


def read_header(path: Path) -> Header:
    """Parse and verify one file's header against the file's size.

    CheckpointError when the file is absent, is not safetensors, or is shorter or longer than its
    header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
            raw = file.read(length) if length <= min(_MAX_HEADER, size) else b""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    again = "download or copy the file again"
    if not raw or len(raw) < length:
        raise CheckpointError(
            f"{path} is {size} bytes and ends before its header does, or is no safetensors file; "
            f"{again}"
        )
    try:
        table: dict[str, Any] = json.loads(raw)
        table.pop("__metadata__", None)
        entries = {n: Entry(e["dtype"], tuple(e["shape"])) for n, e in table.items()}
        spans = {n: (e["data_offsets"][0], e["data_offsets"][1]) for n, e in table.items()}
        end = 0
        for start, stop in sorted(spans.values()):
            if start != end or stop < start:
                raise ValueError("tensors overlap or leave a gap")
            end = stop
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{path} has a damaged safetensors header ({error}); {again}"
        ) from None
    if 8 + length + end != size:
        state = "truncated" if 8 + length + end > size else "followed by unknown bytes"
        raise CheckpointError(
            f"{path} is {state}: it has {size} bytes, its header describes {8 + length + end}; "
            f"{again}"
        )
    for name, entry in entries.items():
        start, stop = spans[name]
        if entry.dtype in DTYPES and stop - start != entry.nbytes:
            raise CheckpointError(
                f"{path}: tensor {name} occupies {stop - start} bytes, but its shape "
                f"{list(entry.shape)} in {entry.dtype} needs {entry.nbytes}; {again}"
            )
    return Header(path, entries, hashlib.sha256(raw).hexdigest())


def encode_header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data: tensors lie in the order given, data starts 8-byte aligned."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, entry in entries.items():
        stop = offset + entry.nbytes
        shape = list(entry.shape)
        table[name] = {"dtype": entry.dtype, "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def partial_path(path: Path) -> Path:
    """Where `atomic_file` writes before the file is whole; a killed run leaves it behind."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def atomic_file(path: Path, size: int) -> Iterator[BinaryIO]:
    """A file to write that appears under `path` only once it is whole and on disk.

    `size`: bytes about to be written, for the error. On any failure the temporary file is
    removed; a failure of the disk becomes CheckpointError with the bytes needed and free.
    CheckpointError also when another process is writing the same file.
    """
    partial = partial_path(path)
    try:
        file = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from None
    with file:
        _lock(file, path)
        try:
            file.truncate(0)
            yield file
            os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError):
                free = shutil.disk_usage(path.parent).free
                raise CheckpointError(
                    f"{path} could not be written ({error.strerror}): it needs {size} bytes, "
                    f"{free} are free on its disk; nothing half-written was left"
                ) from error
            raise
    _sync_folder(path.parent)


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write every byte: an unbuffered file may take fewer at a time than it is given."""
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view) :]


def write_atomic(path: Path, data: bytes) -> None:
    with atomic_file(path, len(data)) as file:
        write_all(file, data)


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The writer before us may have renamed this very file into place in the meantime.
        ours = os.path.samestat(os.stat(partial_path(path)), os.fstat(file.fileno()))
    except OSError:
        ours = False
    if not ours:
        raise CheckpointError(
            f"{path} is being written by another process; wait for it, or choose another folder"
        )


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: without it a power cut may forget the new name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
