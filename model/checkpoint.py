"""Opening a checkpoint: verified from headers, then read one memory-mapped tensor at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsa_hal.errors import CheckpointError
from dsa_hal.model.config import ModelConfig
from dsa_hal.model.layout import FP8, Layout, Piece, demo_layout, hf_layout
from dsa_hal.model.schema import expected
from dsa_hal.model.shards import Header, read_header

_RANK_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")
_DEMO_CONFIGS = ("config.json", "config_671B_v3.2.json")
_TIED = {"lm_head.weight": "model.embed_tokens.weight"}
_WORDS = {FP8: "fp8", "BF16": "bf16", "F16": "fp16", "F32": "fp32"}
# Touched pages of a mapped file count as resident until its mapping goes; start a new mapping
# after this many bytes so that a loader that copies never holds the weights twice.
_REMAP_BYTES = 256 << 20
_SCAN_ELEMENTS = 1 << 22


class Checkpoint:
    """A model's weights on disk, in either published format.

    Made by `Checkpoint.open`. `format`: "hf" or "demo". `weights_dtype`: "fp8" when any linear is
    stored as e4m3, else "bf16", "fp16" or "fp32" (the widest found). `headers`: one per file.
    `mtp`, `ignored`: stored names the model does not read. Names given to the methods are
    canonical (Hugging Face's published ones), whatever the format.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        kind: Literal["hf", "demo"],
        headers: Sequence[Header],
        layout: Layout,
    ) -> None:
        self.path, self.config, self.format = path, config, kind
        self.headers = tuple(headers)
        self.mtp, self.ignored = layout.mtp, layout.ignored
        self._places = layout.places
        self._open: dict[Path, Any] | None = {}
        self._handed_out = 0
        linears = [spec.name for spec in expected(config).values() if spec.kind == "linear"]
        stored = {layout.places[name].dtype for name in linears}
        kinds = stored - {FP8} if FP8 not in stored else {FP8}
        self.weights_dtype = _WORDS[kinds.pop()] if len(kinds) == 1 else "fp32"

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a folder and verify everything that headers can tell, before any weight is read.

        Hugging Face: `config.json` and one or many safetensors, with or without an index. The
        demo: `model{rank}-mp{N}.safetensors` and a JSON with the demo's fields. CheckpointError
        (files, tensors, shapes, dtypes) or ConfigError (the config's own values) says what is
        wrong and what to do.
        """
        folder = Path(path)
        if not folder.is_dir():
            state = "is a file, not a folder" if folder.exists() else "does not exist"
            raise CheckpointError(
                f"checkpoint {folder} {state}; pass the folder that holds config.json and the "
                "*.safetensors files"
            )
        ranks = _rank_files(folder)
        if ranks:
            config = _demo_config(folder)
            headers = [read_header(file) for file in ranks]
            return cls(folder, config, "demo", headers, demo_layout(config, headers, folder))
        config = ModelConfig.from_hf(_json(folder / "config.json"), str(folder / "config.json"))
        headers = _hf_headers(folder)
        return cls(folder, config, "hf", headers, hf_layout(config, headers, folder))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files; tensors already handed out stay valid."""
        self._open = None

    @property
    def tokenizer_path(self) -> Path | None:
        """The folder, when it holds a tokenizer."""
        return self.path if (self.path / "tokenizer.json").is_file() else None

    def notes(self) -> list[str]:
        """Sentences a user should see about what was left out."""
        lines = []
        layers = sorted({name.split("layers.")[1].split(".")[0] for name in self.mtp}, key=int)
        for layer in layers:
            lines.append(
                f"layer {layer} is the multi-token prediction (MTP) module: recognised and left out"
            )
        if self.ignored:
            lines.append(
                f"{len(self.ignored)} tensors that the model does not read are ignored, "
                f"first {self.ignored[0]}"
            )
        return lines

    def names(self) -> list[str]:
        """Canonical names of all tensors the model reads, scales included."""
        return list(self._places)

    def dtype(self, name: str) -> str:
        """Stored dtype in safetensors' words, for example "F8_E4M3" or "BF16"."""
        return self._places[name].dtype

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU in its stored dtype; scales always as fp32.

        Memory-mapped: a view of the file wherever it lies in one piece; a tensor that the demo
        cut between ranks is joined in memory. Do not write to it. With tied embeddings
        `lm_head.weight` is the embedding.
        """
        if self.config.tie_word_embeddings:
            name = _TIED.get(name, name)
        place = self._places.get(name)
        if place is None:
            raise CheckpointError(f"{self.path} holds no tensor {name} for this model")
        parts = [self._piece(piece) for piece in place.pieces]
        whole = parts[0] if len(parts) == 1 else _join(parts, place.dim)
        return whole.float() if whole.dtype == torch.float8_e8m0fnu else whole

    def linear(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A linear's weight [out, in], and its fp32 scales [ceil(out/128), ceil(in/128)] when it
        is e4m3. `name` with or without ".weight"."""
        weight = name if name.endswith(".weight") else name + ".weight"
        scale = weight + "_scale_inv"
        return self.tensor(weight), self.tensor(scale) if scale in self._places else None

    def expert_stack(
        self, layer: int, part: Literal["gate_up", "down"]
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The routed experts' weights of one layer in id order, one at a time, with their scales.

        "gate_up": [2 * moe_intermediate_size, hidden], gate's rows first; "down": [hidden,
        moe_intermediate_size]. Meant for filling a preallocated stack: at most one expert is
        held beside it.
        """
        names = ("gate_proj", "up_proj") if part == "gate_up" else ("down_proj",)
        for expert in range(self.config.n_routed_experts):
            stem = f"model.layers.{layer}.mlp.experts.{expert}."
            weights, scales = zip(*(self.linear(stem + name) for name in names), strict=True)
            if len(names) == 1:
                yield weights[0], scales[0]
            elif scales[0] is None:
                yield _join(weights, 0), None
            else:
                yield _join(weights, 0), torch.cat(scales)

    def check_finite(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every weight and scale; CheckpointError names the first NaN or infinity found.

        `progress(done, total)` counts tensors. Memory stays at one chunk of one tensor.
        """
        for done, name in enumerate(self._places):
            tensor = self.tensor(name)
            at = _first_non_finite(tensor)
            if at is not None:
                where = list(torch.unravel_index(torch.tensor(at), tensor.shape))
                index = [int(axis) for axis in where]
                files = ", ".join(str(piece.path) for piece in self._places[name].pieces)
                raise CheckpointError(
                    f"{files}: tensor {name} holds {tensor[tuple(index)].float().item()} at "
                    f"{index}; the checkpoint is damaged, download or convert it again"
                )
            if progress is not None:
                progress(done + 1, len(self._places))

    def _piece(self, piece: Piece) -> Tensor:
        if self._open is None:
            raise CheckpointError(f"checkpoint {self.path} is closed; open it again")
        if self._handed_out > _REMAP_BYTES:
            self._open.clear()
            self._handed_out = 0
        if piece.path not in self._open:
            try:
                self._open[piece.path] = safe_open(piece.path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{piece.path} cannot be mapped ({error}); download or copy it again"
                ) from None
        stored: Tensor = self._open[piece.path].get_tensor(piece.stored)
        if piece.at is not None:
            expert, start, stop = piece.at
            stored = stored[expert, start:stop]
        self._handed_out += stored.nbytes
        return stored


def _join(parts: Sequence[Tensor], dim: int) -> Tensor:
    """torch.cat for any dtype: it has no kernel for some one-byte floats on some versions."""
    if parts[0].element_size() > 1:
        return torch.cat(tuple(parts), dim)
    return torch.cat([part.view(torch.uint8) for part in parts], dim).view(parts[0].dtype)


def _first_non_finite(tensor: Tensor) -> int | None:
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _SCAN_ELEMENTS):
        chunk = flat[start : start + _SCAN_ELEMENTS]
        if chunk.dtype == torch.float8_e4m3fn:
            # e4m3fn has no infinity; its NaN is all ones below the sign.
            bad = (chunk.view(torch.uint8) & 0x7F) == 0x7F
        else:
            bad = ~torch.isfinite(chunk)
        if bad.any():
            return start + int(bad.to(torch.uint8).argmax())
    return None


def _json(path: Path) -> dict[str, Any]:
    data = _any_json(path)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not a JSON object")
    return data


def _any_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); a checkpoint folder needs it beside the "
            "weights"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy it again") from None


def _hf_headers(folder: Path) -> list[Header]:
    """The shards that transformers would read: the single file, else the index's, else all."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [read_header(single)]
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{folder} holds no *.safetensors files; download the weights in that format"
            )
        return [read_header(file) for file in files]
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    files = sorted({folder / str(name) for name in weight_map.values()})
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of the {len(files)} shards that {index.name} lists, "
            f"first {absent[0]}; download them"
        )
    headers = {file.name: read_header(file) for file in files}
    for name, file in weight_map.items():
        if name not in headers[str(file)].entries:
            raise CheckpointError(
                f"{folder / str(file)} lacks tensor {name} that {index.name} promises there; "
                "download both again"
            )
    return list(headers.values())


def _rank_files(folder: Path) -> list[Path]:
    """The demo's files in rank order, or nothing when the folder is not in the demo's format."""
    found = {m[0]: int(m[2]) for f in folder.iterdir() if (m := _RANK_FILE.fullmatch(f.name))}
    if not found:
        return []
    sizes = sorted(set(found.values()))
    if len(sizes) > 1:
        raise CheckpointError(
            f"{folder} holds rank files of different conversions (mp {sizes}); keep one of them"
        )
    names = [f"model{rank}-mp{sizes[0]}.safetensors" for rank in range(sizes[0])]
    absent = [name for name in names if name not in found]
    if absent:
        raise CheckpointError(
            f"{folder} lacks {absent[0]} of its {sizes[0]} rank files; finish the conversion, or "
            "copy it"
        )
    return [folder / name for name in names]


def _demo_config(folder: Path) -> ModelConfig:
    named = [folder / name for name in _DEMO_CONFIGS if (folder / name).is_file()]
    others = sorted(set(folder.glob("*.json")) - set(named))
    for path in named:
        data = _json(path)
        if "model_type" in data:
            return ModelConfig.from_hf(data, str(path))
        if _is_demo(data):
            return ModelConfig.from_demo(data, str(path))
    matching = [path for path in others if _is_demo(_any_json(path))]
    if len(matching) != 1:
        found = ", ".join(path.name for path in matching) or "none"
        raise CheckpointError(
            f"{folder} needs one JSON with the demo's fields (dim, n_layers); found {found}; copy "
            "config_671B_v3.2.json or the model's config.json there"
        )
    return ModelConfig.from_demo(_json(matching[0]), str(matching[0]))


def _is_demo(data: object) -> bool:
    return isinstance(data, dict) and "dim" in data and "n_layers" in data
