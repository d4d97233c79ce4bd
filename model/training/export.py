"""A trained network in the published format: bf16 or fp32 as it is, or FP8 by blocks of 128x128."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsa_hal.errors import CheckpointError
from dsa_hal.model.checkpoint import Checkpoint
from dsa_hal.model.config import BLOCK, ModelConfig, Quant
from dsa_hal.model.schema import expected
from dsa_hal.model.training.network import Moe, Network
from dsa_hal.ops.quant import quantize_fp8

FLOATS = {"bf16": torch.bfloat16, "fp32": torch.float32}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_BIAS = "e_score_correction_bias"


def weights(network: Network) -> dict[str, Tensor]:
    """The network's tensors by canonical name; experts are views of their stacks."""
    found: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        found[name if name.startswith("lm_head.") else f"model.{name}"] = value
    for at, moe in network.named_modules():
        if isinstance(moe, Moe):
            stacks = found.pop(f"model.{at}.gate_up"), found.pop(f"model.{at}.down")
            for expert, (gate_up, down) in enumerate(zip(*stacks, strict=True)):
                stem = f"model.{at}.experts.{expert}."
                gate, up = gate_up.chunk(2)
                found[stem + "gate_proj.weight"] = gate
                found[stem + "up_proj.weight"] = up
                found[stem + "down_proj.weight"] = down
    return found


@torch.no_grad()
def load_weights(network: Network, path: Path) -> None:
    """Fill the network from a checkpoint folder; CheckpointError if it is of another shape."""
    with Checkpoint.open(path) as checkpoint:
        theirs = replace(checkpoint.config, quant=None)
        if theirs != replace(network.config, quant=None):
            raise CheckpointError(
                f"{path} holds a model of another configuration than the one to be trained; its"
                f" config.json says {_difference(theirs, network.config)}"
            )
        for name, ours in weights(network).items():
            weight, scale = checkpoint.linear(name) if name.endswith("weight") else (
                checkpoint.tensor(name), None)  # fmt: skip
            if scale is not None:
                raise CheckpointError(f"{path} is quantised ({name}); train from its bf16 export")
            ours.copy_(weight)


def _difference(theirs: ModelConfig, ours: ModelConfig) -> str:
    return ", ".join(
        f"{name} {getattr(theirs, name)} where {getattr(ours, name)} is wanted"
        for name in ModelConfig.__dataclass_fields__
        if getattr(theirs, name) != getattr(ours, name) and name != "quant"
    )


def export(
    network: Network, tokenizer: Path, folder: Path, fmt: str, shard_mb: int = 0,
    generation: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write the network as a checkpoint: `fmt` "bf16" or "fp32"; the folder appears whole.

    shard_mb    cut the weights into files of at most so many MB (0: one file)
    generation  what generation_config.json says of sampling; None = greedy
    """
    tensors = ((n, _stored(n, t, FLOATS[fmt])) for n, t in weights(network).items())
    sampling = {"do_sample": True} | dict(generation) if generation else {}
    _write(network.config, fmt, tensors, tokenizer, sampling, folder, shard_mb)


def quantized(source: Path, folder: Path) -> None:
    """An FP8 copy of an unquantised checkpoint: every linear as e4m3 with power-of-two scales,
    embeddings, norms, gates and the indexer's head weights as they were."""
    with Checkpoint.open(source) as checkpoint:
        config = replace(checkpoint.config, quant=Quant())

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for spec in expected(config).values():
                value = checkpoint.tensor(spec.name)
                if value.dtype == torch.float8_e4m3fn:
                    raise CheckpointError(f"{source} is quantised already ({spec.name})")
                if spec.kind == "linear":
                    weight, scale = quantize_fp8.reference(value.float(), block_rows=BLOCK)
                    yield spec.name, weight
                    yield spec.scale_name, scale
                else:
                    yield spec.name, _stored(spec.name, value, torch.bfloat16)

        file = source / "generation_config.json"
        sampling = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        _write(config, "bf16", tensors(), source, sampling, folder, 0)


def _stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    kept = torch.float32 if name.endswith(_BIAS) else dtype
    return value.detach().to("cpu", kept).contiguous().clone()


def _write(
    config: ModelConfig, fmt: str, tensors: Iterable[tuple[str, Tensor]], tokenizer: Path,
    sampling: Mapping[str, Any], folder: Path, shard_mb: int,
) -> None:  # fmt: skip
    if folder.exists():
        raise CheckpointError(f"{folder} exists; name a folder that does not")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        _save(made, dict(tensors), shard_mb * 1_000_000)
        settings: dict[str, Any] = config.to_hf() | {
            "torch_dtype": "float32" if fmt == "fp32" else "bfloat16"
        }
        ends = {name: settings[name] for name in ("bos_token_id", "eos_token_id")}
        _dump(made / "config.json", settings)
        _dump(made / "generation_config.json", dict(sampling) | ends)
        for name in _TOKENIZER:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, made / name)
        made.rename(folder)


def _save(folder: Path, tensors: Mapping[str, Tensor], limit: int) -> None:
    """One file, or numbered shards of at most `limit` bytes each with their index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in tensors.items():
        if limit and size + value.nbytes > limit and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"model{part}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # the library keeps it to its owner
        places |= dict.fromkeys(shard, file)
    if len(shards) == 1:
        return
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    _dump(folder / "model.safetensors.index.json", index)


def _dump(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
