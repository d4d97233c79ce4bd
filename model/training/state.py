"""Checkpoints of a run: a folder per step, whole or not there, each a model in the published format
with the optimizer's state beside it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import AdamW

from dsa_hal.errors import CheckpointError
from dsa_hal.model.training.export import export
from dsa_hal.model.training.network import Network
from dsa_hal.model.training.settings import STAGES, StageName

KEPT = 2
"""Checkpoints of a run that stay; older ones are deleted once a newer one is whole."""

_ORDER = [str(name) for name in STAGES]
_NAME = re.compile(rf"({'|'.join(_ORDER)})-(\d+)")
_STATE, _POSITION = "training.safetensors", "training.json"


@dataclass(frozen=True)
class Position:
    """Where a run stands: `step` steps of `stage` are done, `windows` were read since the start."""

    stage: StageName
    step: int
    windows: int
    settings: str

    @property
    def folder(self) -> str:
        return f"{self.stage}-{self.step:06d}"


def checkpoints(out: Path) -> list[Path]:
    """Folders of a run's checkpoints, oldest first."""
    found: list[tuple[int, int, Path]] = []
    for path in (out / "checkpoints").glob("*"):
        if match := _NAME.fullmatch(path.name):
            found.append((_ORDER.index(match[1]), int(match[2]), path))
    return [path for *_, path in sorted(found)]


def save(
    out: Path, network: Network, optimizer: AdamW, position: Position, tokenizer: Path
) -> Path:
    """Write `out/checkpoints/STAGE-STEP`, then delete all but the newest."""
    folder = out / "checkpoints" / position.folder
    if folder.exists():
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    export(network, tokenizer, partial, "bf16")
    save_file(_tensors(network, optimizer), partial / _STATE)
    (partial / _POSITION).write_text(json.dumps(asdict(position), indent=2) + "\n")
    partial.rename(folder)
    for old in checkpoints(out)[:-KEPT]:
        shutil.rmtree(old)
    return folder


def position_of(folder: Path) -> Position:
    """What a checkpoint says of itself; CheckpointError when it cannot be read."""
    try:
        position = Position(**json.loads((folder / _POSITION).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} is no checkpoint of a training run: {error}") from None
    if folder.name != position.folder:
        raise CheckpointError(f"{folder} says that it is {position.folder}; delete it")
    return position


def restore(folder: Path, network: Network, optimizer: AdamW | None) -> None:
    """Fill the network in fp32, and the optimizer if given, from a checkpoint."""
    try:
        tensors = load_file(folder / _STATE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder / _STATE} cannot be read ({error}); delete that folder to resume from the"
            " checkpoint before it"
        ) from None
    with torch.no_grad():
        for name, value in network.state_dict().items():
            value.copy_(tensors[f"weight/{name}"])
    if optimizer is None:
        return
    for name, parameter in _named(network, optimizer):
        optimizer.state[parameter] = {
            # The fused optimizer counts its steps beside the parameters.
            "step": tensors[f"step/{name}"].to(parameter.device),
            "exp_avg": tensors[f"mean/{name}"].to(parameter.device),
            "exp_avg_sq": tensors[f"square/{name}"].to(parameter.device),
        }


def _tensors(network: Network, optimizer: AdamW) -> dict[str, Tensor]:
    found = {f"weight/{n}": v.detach().cpu() for n, v in network.state_dict().items()}
    for name, parameter in _named(network, optimizer):
        state = optimizer.state[parameter]
        if state:
            found[f"step/{name}"] = state["step"].detach().cpu()
            found[f"mean/{name}"] = state["exp_avg"].cpu()
            found[f"square/{name}"] = state["exp_avg_sq"].cpu()
    return {name: value.contiguous() for name, value in found.items()}


def _named(network: Network, optimizer: AdamW) -> list[tuple[str, torch.nn.Parameter]]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [(n, p) for n, p in network.named_parameters() if id(p) in held]
