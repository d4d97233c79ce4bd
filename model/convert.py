"""Hugging Face checkpoint to the demo's format, streamed, one rank file at a time.

Each rank file's header follows from the config alone, so it is written first and the tensors
after it as they are read: memory stays at one tensor, or one rank's part of it. A file appears
under its final name only when whole, stamped with a fingerprint of its source; a second run keeps
such files and makes the rest.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsa_hal.errors import CheckpointError
from dsa_hal.model.checkpoint import Checkpoint
from dsa_hal.model.config import BLOCK
from dsa_hal.model.layout import FP8, shard_shape
from dsa_hal.model.schema import Shape, blocks, expected
from dsa_hal.model.shards import (
    Entry,
    atomic_file,
    encode_header,
    partial_path,
    write_all,
    write_atomic,
)

Progress = Callable[[int, int], None]
_STAMP = "dsa_hal_source"
_COPIED = ("*token*", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class _Item:
    """One tensor of a rank file: the canonical source and the part of it to keep."""

    stored: str
    source: str
    entry: Entry
    dim: int | None
    start: int


@dataclass(frozen=True)
class _RankFile:
    path: Path
    items: tuple[_Item, ...]
    header: bytes

    @property
    def size(self) -> int:
        return len(self.header) + sum(item.entry.nbytes for item in self.items)

    def is_whole(self) -> bool:
        """Whether the final file exists, with this header (fingerprint included) and size."""
        if not self.path.is_file() or self.path.stat().st_size != self.size:
            return False
        with self.path.open("rb") as file:
            return file.read(len(self.header)) == self.header


def convert(
    hf_ckpt_path: str | Path,
    save_path: str | Path,
    n_experts: int,
    model_parallel: int,
    progress: Progress | None = None,
) -> list[Path]:
    """Write `model{rank}-mp{model_parallel}.safetensors` for every rank, the tokenizer's files
    and the demo's `config.json` into `save_path`; return the rank files.

    Names and cuts are the demo's; dtypes stay as stored. `n_experts` must be the config's, as
    with the demo's own script. `progress(done, total)` counts bytes, kept files included.
    CheckpointError or ConfigError before anything is written when the sizes do not divide, the
    disk is too small, or `save_path` holds something else; CheckpointError when the disk fills
    on the way. Run again to continue.
    """
    save = Path(save_path)
    with Checkpoint.open(hf_ckpt_path) as source:
        if source.format != "hf":
            raise CheckpointError(f"{source.path} is in the demo's format already; nothing to do")
        config_text = json.dumps(source.config.to_demo(), indent=4) + "\n"
        _check_cut(source, n_experts, model_parallel)
        files = [_rank_file(source, save, rank, model_parallel) for rank in range(model_parallel)]
        _check_target(save, source.path, files, config_text)
        _make_folder(save)
        total = sum(file.size for file in files)
        done = 0

        def report(within_file: int) -> None:
            if progress is not None:
                progress(done + within_file, total)

        for file in files:
            if not file.is_whole():
                _write(source, file, report)
            report(file.size)
            done += file.size
        for path in _side_files(source.path):
            write_atomic(save / path.name, path.read_bytes())
        # Last, so that a folder with a config is a folder that is complete.
        write_atomic(save / "config.json", config_text.encode())
    return [file.path for file in files]


def _check_cut(source: Checkpoint, n_experts: int, ranks: int) -> None:
    config = source.config
    if n_experts != config.n_routed_experts:
        raise CheckpointError(
            f"n_experts is {n_experts}, but {source.path} has {config.n_routed_experts} routed "
            "experts; pass that number"
        )
    if ranks < 1 or n_experts % ranks or config.num_attention_heads % ranks:
        raise CheckpointError(
            f"model_parallel is {ranks}; it must be at least 1 and divide the {n_experts} experts "
            f"and the {config.num_attention_heads} attention heads"
        )
    if ranks == 1:
        return
    for spec in expected(config).values():
        if spec.shard_dim is None:
            continue
        part = shard_shape(spec, ranks, spec.shard_dim)[spec.shard_dim]
        if source.dtype(spec.name) == FP8 and part % BLOCK:
            raise CheckpointError(
                f"model_parallel {ranks} leaves {part} of {spec.name} {list(spec.shape)} to each "
                f"rank, which splits its {BLOCK}-wide FP8 scale blocks; choose fewer ranks"
            )


def _rank_file(source: Checkpoint, save: Path, rank: int, ranks: int) -> _RankFile:
    items = tuple(_items(source, rank, ranks))
    metadata = {"format": "pt", _STAMP: _fingerprint(source)}
    header = encode_header({item.stored: item.entry for item in items}, metadata)
    return _RankFile(save / f"model{rank}-mp{ranks}.safetensors", items, header)


def _items(source: Checkpoint, rank: int, ranks: int) -> Iterator[_Item]:
    per_rank = source.config.n_routed_experts // ranks
    for spec in expected(source.config).values():
        if spec.expert is not None and spec.expert // per_rank != rank:
            continue
        dim = spec.shard_dim if ranks > 1 else None
        shape = shard_shape(spec, ranks, dim)
        stored = source.dtype(spec.name)
        yield _item(spec.demo_name, spec.name, stored, shape, dim, rank)
        if stored == FP8:
            yield _item(spec.demo_scale_name, spec.scale_name, "F32", blocks(shape), dim, rank)


def _item(stored: str, source: str, dtype: str, shape: Shape, dim: int | None, rank: int) -> _Item:
    return _Item(stored, source, Entry(dtype, shape), dim, 0 if dim is None else rank * shape[dim])


def _fingerprint(source: Checkpoint) -> str:
    """Of the source's headers, sizes and times: changes when any shard was replaced."""
    digest = hashlib.sha256()
    for header in source.headers:
        stat = header.path.stat()
        line = f"{header.path.name} {stat.st_size} {stat.st_mtime_ns} {header.digest}\n"
        digest.update(line.encode())
    return digest.hexdigest()


def _check_target(save: Path, source: Path, files: list[_RankFile], config_text: str) -> None:
    """Refuse a folder that holds anything this conversion would overwrite or be confused with."""
    elsewhere = "choose an empty folder, or delete what is there"
    if save.resolve() == source.resolve():
        raise CheckpointError(f"{save} is the source itself; {elsewhere}")
    ours = {file.path for file in files}
    strangers = sorted(path for path in save.glob("*.safetensors") if path not in ours)
    strangers += [file.path for file in files if file.path.exists() and not file.is_whole()]
    config = save / "config.json"
    if config.exists() and config.read_bytes() != config_text.encode():
        strangers.append(config)
    if strangers:
        raise CheckpointError(
            f"{strangers[0]} belongs to another checkpoint or another state of this one; "
            f"{elsewhere}"
        )
    needed = sum(file.size for file in files if not file.is_whole())
    partials = [partial_path(file.path) for file in files]
    reusable = sum(path.stat().st_blocks * 512 for path in partials if path.exists())
    disk = next(folder for folder in (save, *save.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(disk).free + reusable
    if needed > free:
        raise CheckpointError(
            f"{save} needs {needed} more bytes, but {free} are free on its disk; free some, or "
            "choose another disk"
        )


def _make_folder(save: Path) -> None:
    try:
        save.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{save} cannot be created: {error.strerror}") from None


def _write(source: Checkpoint, file: _RankFile, report: Callable[[int], None]) -> None:
    done = len(file.header)
    with atomic_file(file.path, file.size) as out:
        write_all(out, file.header)
        for item in file.items:
            write_all(out, _bytes(_part(source.tensor(item.source), item)))
            done += item.entry.nbytes
            report(done)


def _part(tensor: Tensor, item: _Item) -> Tensor:
    if item.dim is None:
        return tensor
    return tensor.narrow(item.dim, item.start, item.entry.shape[item.dim])


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data


def _side_files(folder: Path) -> list[Path]:
    found = {path for pattern in _COPIED for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.suffix != ".safetensors")
