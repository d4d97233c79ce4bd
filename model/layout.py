"""Where every tensor of the model lies in a checkpoint's files, checked against the config.

Works from headers alone. Both layouts (Hugging Face's, fused experts included, and the demo's
rank files) end as one map from canonical names to places, so that reading knows no format.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsa_hal.errors import CheckpointError
from dsa_hal.model.config import BLOCK, ModelConfig
from dsa_hal.model.schema import Shape, TensorSpec, blocks, expected, layer_beyond
from dsa_hal.model.shards import Entry, Header

FP8 = "F8_E4M3"
_FLOATS = ("BF16", "F16", "F32")
_SCALES = ("F32", "F8_E8M0")
_OTHER_MODEL = "the weights and the config belong to different models"


@dataclass(frozen=True)
class Piece:
    """A stored tensor, or the part `at` of it: (expert, first row, row after the last)."""

    path: Path
    stored: str
    at: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Place:
    """A canonical tensor: its pieces, joined along `dim`."""

    pieces: tuple[Piece, ...]
    dtype: str
    shape: Shape
    dim: int = 0


@dataclass(frozen=True)
class Layout:
    """`mtp` and `ignored` hold stored names that the model does not read."""

    places: dict[str, Place]
    mtp: tuple[str, ...]
    ignored: tuple[str, ...]


class _Files:
    """The stored tensors of one rank (or of a whole Hugging Face checkpoint) by stored name."""

    def __init__(self, headers: Iterable[Header]) -> None:
        self.entries: dict[str, Entry] = {}
        self.paths: dict[str, Path] = {}
        self.used: set[str] = set()
        for header in headers:
            for name, entry in header.entries.items():
                if name in self.paths:
                    raise CheckpointError(
                        f"tensor {name} is in both {self.paths[name]} and {header.path}; keep the "
                        "files of one checkpoint in the folder, or its index file"
                    )
                self.entries[name], self.paths[name] = entry, header.path

    def place(self, stored: str, shape: Shape, dtypes: Sequence[str]) -> Place | None:
        """The stored tensor, None if absent; CheckpointError on another shape or dtype."""
        entry = self.entries.get(stored)
        if entry is None:
            return None
        where = f"{self.paths[stored]}: tensor {stored}"
        if entry.shape != shape:
            raise CheckpointError(
                f"{where} has shape {list(entry.shape)}, but the config asks for {list(shape)}; "
                f"{_OTHER_MODEL}"
            )
        if entry.dtype not in dtypes:
            raise CheckpointError(
                f"{where} is stored as {entry.dtype}, but {' or '.join(dtypes)} is expected; "
                "convert it, or use a checkpoint in the published format"
            )
        self.used.add(stored)
        return Place((Piece(self.paths[stored], stored),), entry.dtype, shape)


def hf_layout(config: ModelConfig, headers: Sequence[Header], source: Path) -> Layout:
    """Places in a Hugging Face checkpoint, its experts one by one or fused per layer.

    `source` is named when tensors are missing. Fused experts (transformers' in-memory form) are
    `experts.gate_up_proj` [experts, 2 * width, hidden], gate first, and `experts.down_proj`.
    """
    files = _Files(headers)
    places: dict[str, Place] = {}
    missing: list[str] = []
    for spec in expected(config).values():
        weight, scale = _hf_places(files, config, spec)
        if weight is None:
            missing.append(spec.name)
            continue
        places[spec.name] = weight
        if weight.dtype == FP8:
            if scale is None:
                missing.append(spec.scale_name)
            else:
                places[spec.scale_name] = scale
    return _finished(config, places, [files], missing, source)


def _hf_places(
    files: _Files, config: ModelConfig, spec: TensorSpec
) -> tuple[Place | None, Place | None]:
    dtypes = (*_FLOATS, FP8) if spec.kind == "linear" else _FLOATS
    if spec.expert is None or spec.name in files.entries:
        weight = files.place(spec.name, spec.shape, dtypes)
        if weight is None or weight.dtype != FP8:
            return weight, None
        return weight, files.place(spec.scale_name, spec.scale_shape, _SCALES)
    stem, _, which = spec.name.removesuffix(".weight").rpartition(".")
    stem = stem.rpartition(".")[0]
    fused = f"{stem}.down_proj" if which == "down_proj" else f"{stem}.gate_up_proj"
    half = 1 if which == "up_proj" else 0
    weight = _fused(files, fused, config.n_routed_experts, spec.shape, dtypes, spec.expert, half)
    if weight is None or weight.dtype != FP8:
        return weight, None
    scale = fused + "_scale_inv"
    shape = spec.scale_shape
    return weight, _fused(files, scale, config.n_routed_experts, shape, _SCALES, spec.expert, half)


def _fused(
    files: _Files,
    stored: str,
    experts: int,
    shape: Shape,
    dtypes: Sequence[str],
    expert: int,
    half: int,
) -> Place | None:
    rows = shape[0] if stored.rpartition(".")[2].startswith("down") else 2 * shape[0]
    place = files.place(stored, (experts, rows, *shape[1:]), dtypes)
    if place is None:
        return None
    at = (expert, half * shape[0], (half + 1) * shape[0])
    return replace(place, pieces=(replace(place.pieces[0], at=at),), shape=shape)


def demo_layout(config: ModelConfig, ranks: Sequence[Header], source: Path) -> Layout:
    """Places in the demo's rank files: cut tensors joined, replicated ones taken from rank 0,
    each expert from the rank that owns it."""
    files = [_Files([header]) for header in ranks]
    mp = len(files)
    if config.n_routed_experts % mp:
        raise CheckpointError(
            f"{source} holds {mp} rank files, but {config.n_routed_experts} experts do not divide "
            f"among them; {_OTHER_MODEL}"
        )
    per_rank = config.n_routed_experts // mp
    places: dict[str, Place] = {}
    missing: list[str] = []
    for spec in expected(config).values():
        holders = files
        if spec.expert is not None:
            holders = [files[spec.expert // per_rank]]
        dim = spec.shard_dim if mp > 1 else None
        dtypes = (*_FLOATS, FP8) if spec.kind == "linear" else _FLOATS
        local = shard_shape(spec, mp, dim)
        weights = [f.place(spec.demo_name, local, dtypes) for f in holders]
        weight = _joined(weights, spec.demo_name, spec.shape, dim)
        if weight is None:
            missing.append(spec.demo_name)
            continue
        places[spec.name] = weight
        if weight.dtype != FP8:
            continue
        if dim is not None and local[dim] % BLOCK:
            raise CheckpointError(
                f"{source}: {spec.demo_name} is cut into {local[dim]} per rank, which splits its "
                f"{BLOCK}-wide scale blocks; convert the original for fewer ranks"
            )
        scales = [f.place(spec.demo_scale_name, blocks(local), _SCALES) for f in holders]
        scale = _joined(scales, spec.demo_scale_name, spec.scale_shape, dim)
        if scale is None:
            missing.append(spec.demo_scale_name)
        else:
            places[spec.scale_name] = scale
    return _finished(config, places, files, missing, source)


def shard_shape(spec: TensorSpec, ranks: int, dim: int | None) -> Shape:
    """Shape of one rank's part when `spec` is cut along `dim`."""
    if dim is None:
        return spec.shape
    if spec.shape[dim] % ranks:
        raise CheckpointError(
            f"{spec.name} of shape {list(spec.shape)} cannot be cut along axis {dim} for {ranks} "
            "ranks; choose a number of ranks that divides it"
        )
    return tuple(n // ranks if axis == dim else n for axis, n in enumerate(spec.shape))


def _joined(
    parts: Sequence[Place | None], stored: str, shape: Shape, dim: int | None
) -> Place | None:
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    if len({part.dtype for part in found}) > 1:
        raise CheckpointError(
            f"tensor {stored} has different dtypes in different rank files; convert it again"
        )
    kept = found[:1] if dim is None else found
    pieces = tuple(piece for part in kept for piece in part.pieces)
    return Place(pieces, found[0].dtype, shape, dim or 0)


def _finished(
    config: ModelConfig,
    places: dict[str, Place],
    files: Sequence[_Files],
    missing: Sequence[str],
    source: Path,
) -> Layout:
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{source} lacks tensor {missing[0]}{more} that its config asks for; download the "
            "missing files, or use the config that came with the weights"
        )
    if config.quant is None and any(place.dtype == FP8 for place in places.values()):
        raise CheckpointError(
            f"{source} holds FP8 weights, but its config names no quantisation; use the config "
            "that came with the weights (quantization_config, or dtype fp8 in the demo's)"
        )
    left = sorted({name for f in files for name in f.entries if name not in f.used})
    beyond = {name: layer_beyond(name, config) for name in left}
    _refuse_lost_layers(config, beyond, source)
    mtp = tuple(name for name in left if beyond[name] is not None)
    ignored = tuple(name for name in left if beyond[name] is None)
    return Layout(places, mtp, ignored)


def _refuse_lost_layers(
    config: ModelConfig, beyond: Mapping[str, int | None], source: Path
) -> None:
    """A layer past the last is the MTP module, or the config states too few layers."""
    modules = {n for name, n in beyond.items() if name.endswith(".eh_proj.weight")}
    for name, layer in beyond.items():
        if layer is not None and layer not in modules:
            raise CheckpointError(
                f"{source} holds {name}, but the config states num_hidden_layers = "
                f"{config.num_hidden_layers} and layer {layer} is no MTP module (it has no "
                f"eh_proj); {_OTHER_MODEL}"
            )
