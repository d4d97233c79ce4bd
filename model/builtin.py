"""The small trained model that comes with the package: what runs when no model is named.

`pretrained/` beside this file holds it in the published format, with held-out text to judge it by
and README.md, its model card. ci/builtin_model builds it.
"""

from __future__ import annotations

from pathlib import Path

from dsa_hal.errors import CheckpointError

_FOLDER = Path(__file__).parent / "pretrained"

HELDOUT = "heldout.jsonl"
"""In its folder: text that it was not trained on."""


def builtin_checkpoint() -> Path:
    """Its folder. CheckpointError where the installation lacks it."""
    if not (_FOLDER / "model.safetensors").is_file():
        raise CheckpointError(
            f"this installation lacks the built-in model ({_FOLDER} holds no model.safetensors);"
            " install dsa_hal again, or name a checkpoint folder with --model"
        )
    return _FOLDER
