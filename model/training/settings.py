"""What a training run is told: one YAML file, read strictly."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from dsa_hal.errors import ConfigError
from dsa_hal.model.config import ModelConfig

StageName = Literal["dense", "focus", "warmup", "sparse"]

STAGES: tuple[StageName, ...] = ("dense", "focus", "warmup", "sparse")
"""The paper's order: the model under dense attention; the indexer alone, against dense attention;
both, the model under sparse attention and the indexer against what was selected. `focus`, a second
dense stage with a regulariser, is ours."""


@dataclass(frozen=True)
class Stage:
    """One stage. The rate rises over `warmup` steps to `lr`, then falls along a cosine to
    `final_lr`.

    steps     optimizer steps; 0 leaves the stage out
    batch     windows per step
    micro     windows per backward pass, to fit memory; 0 = all at once
    index_lr  rate of the indexer; 0 = `lr`
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 0
    final_lr: float = 0.0
    micro: int = 0
    index_lr: float = 0.0


@dataclass(frozen=True)
class Data:
    """Text to learn from and text to judge by: `.jsonl` of {"text": ...}, or `.txt`.

    needles  share of windows into which retrieval tasks are written
    """

    train: str
    heldout: str
    needles: float = 0.0


@dataclass(frozen=True)
class Settings:
    """A training run. Paths are relative to the file.

    model            fields of config.json; as there, unknown ones are ignored
    tokenizer        folder with tokenizer.json
    dense, focus, warmup, sparse  the stages; focus may be left out
    length           tokens per window
    generation       fields of the finished model's generation_config.json; none = greedy
    gate_bias_speed  step of the gate's bias towards an even load, after each step of a stage that
                     trains the gate
    init_std         deviation of embeddings; matrices get fan_in^-0.5
    """

    model: Mapping[str, Any]
    tokenizer: str
    data: Data
    dense: Stage
    warmup: Stage
    sparse: Stage
    length: int
    focus: Stage = Stage(steps=0, batch=1, lr=0.0)
    generation: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    gate_bias_speed: float = 1e-3
    init_std: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    log_every: int = 10
    eval_every: int = 250
    eval_windows: int = 4
    checkpoint_every: int = 1000
    folder: Path = field(default=Path(), metadata={"given": False})

    def stage(self, name: StageName) -> Stage:
        found = getattr(self, name)
        assert isinstance(found, Stage)
        return found

    def config(self) -> ModelConfig:
        """The model's configuration; ConfigError where its fields contradict each other."""
        return ModelConfig.from_hf(self.model, "model")

    def path(self, name: str) -> Path:
        return self.folder / name

    @classmethod
    def load(cls, path: Path, changes: Mapping[str, Any] | None = None) -> Settings:
        """Read a YAML file; `changes` override it by dotted name, as in {"dense.steps": 10}.

        ConfigError names the field, what was found and what is known.
        """
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read as YAML: {error}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} holds {type(raw).__name__}; expected a mapping of settings")
        for name, value in (changes or {}).items():
            _change(raw, name, value, path)
        made: Settings = _read(cls, raw, str(path))
        object.__setattr__(made, "folder", path.resolve().parent)
        made._check(path)
        return made

    def _check(self, path: Path) -> None:
        for name, value, least in (
            ("length", self.length, 2), ("log_every", self.log_every, 1),
            ("eval_every", self.eval_every, 1), ("eval_windows", self.eval_windows, 1),
            ("checkpoint_every", self.checkpoint_every, 1),
        ):  # fmt: skip
            if value < least:
                raise ConfigError(f"{path}: {name} is {value}; it must be at least {least}")
        if not 0 <= self.data.needles <= 1:
            raise ConfigError(f"{path}: data.needles is {self.data.needles}; it is a share, 0 to 1")
        if max(self.betas) >= 1 or not self.clip:
            raise ConfigError(
                f"{path}: betas are {list(self.betas)}, clip is {self.clip}; betas must be below 1,"
                " clip above 0"
            )
        config = self.config()
        if self.length > config.max_position_embeddings:
            raise ConfigError(
                f"{path}: length is {self.length}; the model's positions allow 2 to"
                f" {config.max_position_embeddings}"
            )
        if self.focus.steps and self.length <= config.index_topk:
            raise ConfigError(
                f"{path}: stage focus wants windows longer than the {config.index_topk} keys of"
                f" index_topk; length is {self.length}"
            )
        for name in STAGES:
            stage = self.stage(name)
            if stage.batch < 1 or (stage.micro and stage.batch % stage.micro):
                raise ConfigError(
                    f"{path}: {name}.batch is {stage.batch} with micro {stage.micro}; batch must be"
                    " at least 1 and a multiple of micro"
                )
            if stage.steps and not stage.lr:
                raise ConfigError(f"{path}: {name}.lr is 0 while {name}.steps is {stage.steps}")


def _change(raw: dict[str, Any], name: str, value: Any, path: Path) -> None:
    """Set a dotted name. Groups on the way are copied: YAML's anchors may share them."""
    *parents, last = name.split(".")
    for parent in parents:
        group = raw.get(parent, {})
        if not isinstance(group, dict):
            raise ConfigError(f"{name}: {parent} is no group of settings in {path}")
        raw[parent] = dict(group)
        raw = raw[parent]
    raw[last] = value


def _read(kind: type, raw: Mapping[str, Any], where: str) -> Any:
    """A dataclass from a mapping: every key known, every value of its field's type."""
    known = {f.name: f for f in fields(kind) if f.metadata.get("given", True)}
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            guess = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
            raise ConfigError(f"{where}: unknown setting {name!r}{guess}")
        values[name] = _value(hints[name], value, f"{where}: {name}")
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{where}: the setting {name} is missing")
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    if hint in (Stage, Data):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {value!r}; expected a group of settings")
        return _read(hint, value, where)
    if hint is str and isinstance(value, str):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and number and math.isfinite(value) and value >= 0:
        return float(value)
    if hint is int and isinstance(value, int) and number and value >= 0:
        return value
    if hint == tuple[float, float] and isinstance(value, list) and len(value) == 2:
        return tuple(_value(float, each, where) for each in value)
    if hint == Mapping[str, Any] and isinstance(value, dict) and all(
        isinstance(name, str) for name in value
    ):  # fmt: skip
        return value
    wanted = {
        int: "a whole number of at least 0",
        float: "a number of at least 0 (YAML wants a point in it: 1.0e-3)",
        str: "a text",
        tuple[float, float]: "two numbers of at least 0",
        Mapping[str, Any]: "a group of config.json's fields",
    }
    raise ConfigError(f"{where} is {value!r}; expected {wanted[hint]}")
