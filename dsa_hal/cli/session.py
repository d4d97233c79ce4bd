"""A checkpoint opened for `generate`: prompts are judged first, weights are read after that."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dsa_hal.cli import output
from dsa_hal.errors import BadInput, CheckpointError
from dsa_hal.model import Precision, Transformer, generate
from dsa_hal.model.checkpoint import Checkpoint
from dsa_hal.model.generate import Memory
from dsa_hal.model.tokenizer import Tokenizer
from dsa_hal.selection import current


@dataclass(frozen=True)
class Settings:
    """What the command line says of generation; None means the checkpoint's own."""

    max_new_tokens: int
    temperature: float | None
    top_p: float | None
    repetition_penalty: float | None
    seed: int
    prefill_chunk: int
    max_context: int | None
    chat: bool | None
    record: bool = True


@dataclass(frozen=True)
class Work:
    """Tokens and seconds of reading prompts and of writing answers. The first token of an answer
    comes with the end of its prompt and counts as no decoding."""

    prompt_tokens: int = 0
    prompt_s: float = 0.0
    new_tokens: int = 0
    decoded: int = 0
    decode_s: float = 0.0

    def __add__(self, other: Work) -> Work:
        mine, its = vars(self), vars(other)
        return Work(**{name: mine[name] + its[name] for name in mine})

    def __str__(self) -> str:
        def speed(label: str, tokens: int, seconds: float) -> str:
            rate = f", {output.number(tokens / seconds)} tokens/s" if tokens and seconds else ""
            return f"{label} {tokens} tokens in {output.duration(seconds)}{rate}"

        read = speed("prompt", self.prompt_tokens, self.prompt_s)
        return (
            f"{read}; {speed('decode', self.decoded, self.decode_s)}; {self.new_tokens} new tokens"
        )


class Writer(Protocol):
    """Where new tokens go; `open` comes when nothing else writes to the terminal any more."""

    def token(self, row: int, token: int) -> None: ...
    def open(self) -> None: ...
    def finish(self) -> None: ...


class Session:
    """Made by `Session.open`; `load` reads the weights, then `generate` may be called."""

    model: Transformer

    def __init__(self, path: Path, tokenizer: Tokenizer, limit: int, settings: Settings) -> None:
        self.path, self.tokenizer, self.limit, self.settings = path, tokenizer, limit, settings
        self.chat = settings.chat if settings.chat is not None else bool(tokenizer.chat_template)
        if self.chat and not tokenizer.chat_template:
            raise CheckpointError(f"{path} has no chat template; leave --chat out to continue text")
        self.sampling = _sampling(path, settings)

    @classmethod
    def open(cls, path: Path, settings: Settings) -> Session:
        """Check the checkpoint's headers and read its tokenizer; no weight is read yet."""
        with Checkpoint.open(path) as checkpoint:
            config = checkpoint.config
        limit = min(settings.max_context or sys.maxsize, config.max_position_embeddings)
        return cls(path, Tokenizer.load(path, config), limit, settings)

    def load(self, precision: Precision | None, check_finite: bool, explain: bool) -> None:
        """Read the weights, and tell what was loaded and how text will be chosen."""
        began = time.monotonic()
        with output.progress(f"loading {self.path.name}") as step:
            self.model = Transformer.from_pretrained(
                self.path, precision=precision, progress=step, check_finite=check_finite,
                max_context=self.settings.max_context,
            )  # fmt: skip
        self.model.record = self.settings.record
        for line in self.model.notes:
            output.note(line)
        took = output.duration(time.monotonic() - began)
        output.note(f"loaded {self.path} on {current()} in {took}: {self.model.formats}")
        output.note(f"{'chat' if self.chat else 'plain text'}, {self._choice()}")
        if explain:
            rows = sorted(self.model.served.items())
            output.table(("op", "implementation"), rows, terminal=sys.stderr)

    def _choice(self) -> str:
        told = dict(self.sampling)
        penalty = told.pop("repetition_penalty")
        words = ["greedy"]
        if told["temperature"]:
            words = [f"temperature {told['temperature']:g}", f"top-p {told['top_p']:g}"]
            words.append(f"seed {self.settings.seed}")
        if penalty != 1:
            words.append(f"repetition penalty {penalty:g}")
        return ", ".join(words)

    def encode(self, text: str, place: str) -> list[int]:
        """Tokens of a lone prompt; BadInput that names `place` if the model cannot take them."""
        return self.encode_turns([{"role": "user", "content": text}], text, place)

    def encode_turns(self, turns: Sequence[Mapping[str, str]], text: str, place: str) -> list[int]:
        """Tokens of a conversation, or of `text` where there is no chat template."""
        ids = self.tokenizer.encode_chat(turns) if self.chat else self.tokenizer.encode(text)
        if not 0 < len(ids) <= self.limit:
            raise BadInput(f"{place} has {len(ids)} tokens; this model takes 1 to {self.limit}")
        return ids

    def generate(
        self,
        prompts: Sequence[list[int]],
        writer: Writer,
        first: int = 0,
        memory: Memory | None = None,
    ) -> Work:
        """Continue prompts together; row i draws with the seed of prompt `first` + i, so that a
        prompt's text does not depend on how prompts are put together. `memory` as in `generate`."""
        began = time.monotonic()
        read_at = began
        total = sum(map(len, prompts))
        with output.progress("reading the prompt") as step:

            def read(done: int, of: int) -> None:
                nonlocal read_at
                step(done, of)
                if done == of:
                    read_at = time.monotonic()
                    step.close()
                    writer.open()

            answers = generate(
                self.model, prompts,
                max_new_tokens=self.settings.max_new_tokens,
                **self.sampling,
                seed=(self.settings.seed + first) % (1 << 63),
                stop_ids=self.tokenizer.eos_ids or None,
                prefill_chunk=self.settings.prefill_chunk,
                on_token=writer.token, progress=read, memory=memory,
            )  # fmt: skip
        writer.finish()
        new = sum(map(len, answers))
        steps = max(0, new - len(prompts))
        read_anew = total - (memory.reused if memory is not None else 0)
        return Work(read_anew, read_at - began, new, steps, time.monotonic() - read_at)


def _sampling(path: Path, settings: Settings) -> dict[str, float]:
    """Temperature, top-p and repetition penalty: the command line's, else those of
    generation_config.json, else greedy.

    Raises CheckpointError when the file holds values that cannot be used."""
    file = path / "generation_config.json"
    stated: dict[str, Any] = {}
    if file.is_file():
        try:
            stated = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{file} is not valid JSON ({error}); copy it again") from None
    sampled = isinstance(stated, dict) and stated.get("do_sample", "temperature" in stated)

    stated = stated if isinstance(stated, dict) else {}
    drawn = stated if sampled else {}

    def value(name: str, given: float | None, said: Mapping[str, Any], usual: float) -> float:
        if given is not None:
            return given
        found, most = said.get(name, usual), 1 if name == "top_p" else math.inf
        number = isinstance(found, int | float) and not isinstance(found, bool)
        if not number or not math.isfinite(found) or not 0 <= found <= most:
            raise CheckpointError(f"{file}: {name} is {found!r}; give --{name.replace('_', '-')}")
        return float(found)

    return {
        "temperature": value("temperature", settings.temperature, drawn, 1.0 if sampled else 0.0),
        "top_p": value("top_p", settings.top_p, drawn, 1.0),
        "repetition_penalty": value("repetition_penalty", settings.repetition_penalty, stated, 1.0),
    }
