"""The stages, one after the other, from wherever an earlier run stopped."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.optim import AdamW

from dsa_hal.errors import BadInput, CheckpointError, ConfigError, DsaHalError
from dsa_hal.model.quality.heldout import windows
from dsa_hal.model.shards import write_atomic
from dsa_hal.model.text import tokenised
from dsa_hal.model.tokenizer import Tokenizer
from dsa_hal.model.training import state
from dsa_hal.model.training.data import Windows
from dsa_hal.model.training.export import load_weights
from dsa_hal.model.training.focus import penalty
from dsa_hal.model.training.network import Network
from dsa_hal.model.training.settings import STAGES, Settings, Stage, StageName
from dsa_hal.model.training.state import Position
from dsa_hal.selection import current

Record = dict[str, Any]
Report = Callable[[Record], None]
LOSSES = "losses.jsonl"
LEARNT: dict[StageName, tuple[str, ...]] = {
    "dense": ("loss",),
    "focus": ("loss", "penalty"),
    "warmup": ("index_loss",),
    "sparse": ("loss", "index_loss"),
}
"""What each stage minimises."""


class Trainer:
    """One run in the folder `out`: its checkpoints, its losses, its tokenised text.

    Computes on the device of the backend in force. CheckpointError when `out` holds a run of other
    settings.
    """

    def __init__(self, settings: Settings, out: Path, *, start: Path | None = None) -> None:
        self.settings, self.out = settings, out
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{out} cannot be a run's folder: {error.strerror}") from None
        self.device = torch.device(current().device)
        self.network = Network(settings.config(), settings.seed, settings.init_std)
        tokenizer_path = settings.path(settings.tokenizer)
        self.tokenizer = Tokenizer.load(tokenizer_path, self.network.config)
        if self.tokenizer.bos_id is None:
            raise ConfigError(f"{tokenizer_path} names no bos_token, which begins every window")
        self.bos = self.tokenizer.bos_id
        self.tokenizer_path = tokenizer_path
        self._fingerprint = _fingerprint(settings)
        self.position = Position(STAGES[0], 0, 0, self._fingerprint)
        self._resume = self._latest()
        if self._resume is None and start is not None:
            load_weights(self.network, start)
        self.records: list[Record] = self._recorded()
        self.network.to(self.device)
        self.train_text = self._tokens(settings.data.train)
        heldout = torch.from_numpy(self._tokens(settings.data.heldout).astype(np.int64))
        self.heldout = windows(
            heldout, settings.length + 1, settings.eval_windows, settings.seed, self.bos
        )
        self.windows = Windows(
            self.train_text, settings.length, settings.seed, bos=self.bos,
            needles=settings.data.needles, tokenizer=self.tokenizer.core,
        )  # fmt: skip

    # -- the run -----------------------------------------------------------------------------

    def run(self, report: Report, *, minutes: float = math.inf) -> bool:
        """Train until all stages are done (True), or for so many minutes (False: run again)."""
        deadline = time.monotonic() + 60 * minutes
        for name in STAGES[STAGES.index(self.position.stage) :]:
            if not self._stage(name, report, deadline):
                return False
        return True

    def _stage(self, name: StageName, report: Report, deadline: float) -> bool:
        stage = self.settings.stage(name)
        done = self.position.step if self.position.stage == name else 0
        self.position = Position(name, done, self.position.windows, self._fingerprint)
        optimizer = self._optimizer(name, stage)
        if self._resume is not None:
            state.restore(self._resume, self.network, optimizer if done else None)
            self._resume = None
        for step in range(done, stage.steps):
            if time.monotonic() > deadline:
                self._save(optimizer)
                return False
            record = self._step(name, stage, step, optimizer)
            last = step + 1 == stage.steps
            if (step + 1) % self.settings.eval_every == 0 or last:
                record |= self.judge(name)
            logged = (step + 1) % self.settings.log_every == 0 or "heldout" in record or step == 0
            kept = (step + 1) % self.settings.checkpoint_every == 0 or last
            if not logged and not kept:  # to read a number would wait for the device
                continue
            plain = {k: v.item() if isinstance(v, Tensor) else v for k, v in record.items()}
            _finite(plain)
            if logged:
                self.records.append(plain)
                report(plain)
            if kept:
                self._save(optimizer)
        return True

    def _step(self, name: StageName, stage: Stage, step: int, optimizer: AdamW) -> Record:
        rate = _rate(stage, step)
        for group in optimizer.param_groups:
            ratio = stage.index_lr / stage.lr if group["indexer"] and stage.index_lr else 1.0
            group["lr"] = rate * ratio
        first = self.position.windows
        batch = self.windows.batch(first, stage.batch).to(self.device, non_blocking=True)
        parts = batch.split(stage.micro or stage.batch)
        self.network.train(name != "warmup")
        sums: Record = {}
        for part in parts:
            losses = self._losses(part, name)
            total = torch.stack([losses[key] for key in LEARNT[name]]).sum() / len(parts)
            total.backward()
            for key, value in losses.items():
                sums[key] = sums.get(key, 0.0) + value.detach() / len(parts)
        norm = torch.nn.utils.clip_grad_norm_(
            [p for group in optimizer.param_groups for p in group["params"]], self.settings.clip
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if name != "warmup":
            for gate in self.network.gates():
                gate.balance(self.settings.gate_bias_speed)
        self.position = Position(name, step + 1, first + stage.batch, self._fingerprint)
        return {"stage": name, "step": step + 1, "lr": rate, "norm": norm} | sums

    def _losses(self, batch: Tensor, stage: StageName) -> Record:
        """What a stage looks at, each a mean: `loss`, cross-entropy in nats per token;
        `index_loss`; `best` and `latest`, attention masses, with their `penalty`."""
        found: Record = {}
        with self._precision():
            if stage == "warmup":
                return {"index_loss": self.network.hidden(batch[:, :-1], stage)[1]}
            logits, beside = self.network(batch[:, :-1], stage)
            found["loss"] = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        if stage == "sparse":
            found["index_loss"] = beside
        if stage == "focus":
            found |= {"best": beside[0], "latest": beside[1], "penalty": penalty(beside)}
        return found

    @torch.no_grad()
    def judge(self, name: StageName) -> Record:
        """Held-out loss under the stage's own attention and, after the indexer's training, under
        dense attention beside it."""
        self.network.eval()
        modes: tuple[StageName, ...] = ("dense", "sparse")
        if name in ("dense", "focus"):
            modes = ("dense",)
        found: Record = {}
        for mode in modes:
            losses = [self._losses(w[None].to(self.device), mode)["loss"] for w in self.heldout]
            key = "heldout" if mode == "dense" else "heldout_sparse"
            found[key] = torch.stack(losses).mean()
        return found

    # -- its parts ---------------------------------------------------------------------------

    def _precision(self) -> AbstractContextManager[Any]:
        """bf16 products beside fp32 weights on an accelerator; fp32 throughout on the CPU."""
        if self.device.type == "cpu":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _optimizer(self, name: StageName, stage: Stage) -> AdamW:
        """AdamW over what the stage trains; the rest is frozen. Only matrices decay."""
        index, model = self.network.indexer_parameters(), self.network.model_parameters()
        trained = {"warmup": [index], "sparse": [model, index]}.get(name, [model])
        for p in self.network.parameters():
            p.requires_grad_(False)
        groups: list[dict[str, Any]] = []
        for named in trained:
            for p in named.values():
                p.requires_grad_(True)
            matrices = [p for p in named.values() if p.dim() > 1]
            others = [p for p in named.values() if p.dim() <= 1]
            decay = self.settings.weight_decay
            groups.append(dict(params=matrices, weight_decay=decay, indexer=named is index))
            groups.append(dict(params=others, weight_decay=0.0, indexer=named is index))
        return AdamW(groups, lr=stage.lr, betas=self.settings.betas, fused=True)

    def _latest(self) -> Path | None:
        found = state.checkpoints(self.out)
        if not found:
            return None
        position = state.position_of(found[-1])
        if position.settings != self._fingerprint:
            raise CheckpointError(
                f"{found[-1]} belongs to a run with other settings; name another folder, or delete"
                " it to start anew"
            )
        self.position = position
        return found[-1]

    def _save(self, optimizer: AdamW) -> None:
        """The losses first: those beyond the checkpoint are left out when a run goes on."""
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        write_atomic(self.out / LOSSES, lines.encode())
        state.save(self.out, self.network, optimizer, self.position, self.tokenizer_path)

    def _recorded(self) -> list[Record]:
        """Losses of the steps that the checkpoint to resume from has behind it."""
        file = self.out / LOSSES
        if self._resume is None or not file.is_file():
            return []
        reached = (STAGES.index(self.position.stage), self.position.step)
        try:
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            return [r for r in lines if (STAGES.index(r["stage"]), r["step"]) <= reached]
        except (ValueError, TypeError, KeyError):
            raise CheckpointError(
                f"{file} is damaged; delete it to go on without the losses so far"
            ) from None

    def _tokens(self, name: str) -> NDArray[np.uint32]:
        """A file of text as ids, kept in `out` for the next run."""
        source = self.settings.path(name)
        if not source.is_file():
            raise BadInput(f"{source} is no file; the training file names it as text")
        stamps = [(f.stat().st_size, f.stat().st_mtime_ns) for f in (
            source, self.tokenizer_path / "tokenizer.json")]  # fmt: skip
        kept = self.out / f"tokens-{source.stem}-{_digest(stamps)}.npy"
        if not kept.is_file():
            ids = tokenised(source, self.tokenizer)
            partial = kept.with_suffix(".partial.npy")
            np.save(partial, ids)
            partial.rename(kept)
        loaded: NDArray[np.uint32] = np.load(kept, mmap_mode="r")
        return loaded


def _rate(stage: Stage, step: int) -> float:
    """Linear rise, then a cosine down to `final_lr`."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    share = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return stage.final_lr + (stage.lr - stage.final_lr) * 0.5 * (1 + math.cos(math.pi * share))


def _finite(record: Record) -> None:
    for name, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise DsaHalError(
                f"{name} is {value} at step {record['step']} of stage {record['stage']}: the"
                " training diverged; lower the stage's lr and go on from the last checkpoint"
            )


def _fingerprint(settings: Settings) -> str:
    """What decides the numbers of a run, its files by their names. How long stages are, how fast
    they learn and what is looked at on the way may change between two sittings."""
    told = asdict(settings)
    for name in (
        *STAGES,
        "folder",
        "generation",
        "log_every",
        "eval_every",
        "eval_windows",
        "checkpoint_every",
    ):
        del told[name]
    return _digest(told)


def _digest(told: Any) -> str:
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
