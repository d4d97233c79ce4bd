"""The checkpoint's own tokenizer and chat template.

`tokenizers` reads tokenizer.json and jinja2 renders the template the way transformers does, so
transformers itself, seconds to import, is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import DecodeStream

from dsa_hal.errors import BadInput, CheckpointError
from dsa_hal.model.config import ModelConfig

# DeepSeek-V3.2 ships its chat format as Python code instead of a template. This is its plain
# (non-thinking) form for the three roles; used only where the vocabulary has these tokens.
_ROLE_TOKENS = ("<｜User｜>", "<｜Assistant｜>", "</think>")  # noqa: RUF001
_ROLE_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}" + "{}{{{{ m.content }}}}{}{}".format(*_ROLE_TOKENS) + "{% elif "
    "m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('unknown role ' ~ m.role) }}{% endif %}{% endfor %}"
)


class TextStream:
    """Text of tokens as they arrive; a character whose bytes span tokens comes out whole."""

    def __init__(self, core: tokenizers.Tokenizer) -> None:
        self._core = core
        self._stream = DecodeStream([], skip_special_tokens=True)
        self._ids: list[int] = []
        self._given = 0

    def push(self, token: int) -> str:
        """The text that has become certain, "" while a character is incomplete."""
        self._ids.append(token)
        text = self._stream.step(self._core, token) or ""
        self._given += len(text)
        return text

    def finish(self) -> str:
        """What was held back at the end: bytes that never became a character, as U+FFFD."""
        return self._core.decode(self._ids, skip_special_tokens=True)[self._given :]


class Tokenizer:
    """Made by `Tokenizer.load`. `eos_ids`: any of them ends a text. `chat_template`: jinja source
    or None. `vocab_size`: ids are below it. `core`: the library's own tokenizer."""

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        bos_token: str | None,
        eos_token: str | None,
        eos_ids: Sequence[int],
        chat_template: str | None,
    ) -> None:
        self.core = core
        self._bos, self._eos = bos_token, eos_token
        self.bos_id = None if bos_token is None else core.token_to_id(bos_token)
        self.eos_ids = tuple(eos_ids)
        self.chat_template = chat_template
        self.vocab_size = core.get_vocab_size()

    @classmethod
    def load(cls, path: str | Path, config: ModelConfig | None = None) -> Tokenizer:
        """Read tokenizer.json from a checkpoint folder, and beside it, where present,
        tokenizer_config.json, chat_template.jinja and generation_config.json.

        Ends of text are collected from those files and from `config`. CheckpointError when
        tokenizer.json is absent or damaged, or has ids that the model's embedding lacks.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json; copy tokenizer.json and tokenizer_config.json "
                "from the original checkpoint there"
            )
        try:
            core = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{file} is damaged ({error}); copy it again") from None
        if config is not None and core.get_vocab_size() > config.vocab_size:
            raise CheckpointError(
                f"{file} has {core.get_vocab_size()} tokens, but the model's vocab_size is "
                f"{config.vocab_size}; use the tokenizer that came with the weights"
            )
        settings = _object(folder / "tokenizer_config.json")
        bos, eos = _text(settings.get("bos_token")), _text(settings.get("eos_token"))
        if bos is None and config is not None and config.bos_token_id is not None:
            bos = core.id_to_token(config.bos_token_id)
        eos_ids = dict.fromkeys(config.eos_token_ids if config is not None else ())
        generation = _object(folder / "generation_config.json").get("eos_token_id")
        for each in generation if isinstance(generation, list) else [generation]:
            if isinstance(each, int):
                eos_ids[each] = None
        eos_id = None if eos is None else core.token_to_id(eos)
        if eos_id is not None:
            eos_ids[eos_id] = None
        return cls(core, bos, eos, tuple(eos_ids), _chat_template(folder, settings, core))

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of a text; `add_bos` puts the begin-of-text token first unless it is there."""
        ids = self.core.encode(text, add_special_tokens=False).ids
        if add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation ({"role": ..., "content": ...} each), up to where the
        assistant's next answer begins.

        CheckpointError when there is no chat template or it is faulty, BadInput when it refuses
        these messages.
        """
        if self.chat_template is None:
            raise CheckpointError(
                "the checkpoint has no chat template; give the prompt as plain text"
            )
        try:
            text = (
                _environment()
                .from_string(self.chat_template)
                .render(
                    messages=[dict(message) for message in messages],
                    add_generation_prompt=True,
                    bos_token=self._bos or "",
                    eos_token=self._eos or "",
                    tools=None,
                    documents=None,
                )
            )
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"the checkpoint's chat template is faulty ({error}); give the prompt as plain text"
            ) from None
        except jinja2.TemplateError as error:
            raise BadInput(f"the chat template refuses these messages: {error}") from None
        return self.encode(text, add_bos=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens and unused ids give nothing."""
        return self.core.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> TextStream:
        return TextStream(self.core)


def _object(path: Path) -> dict[str, Any]:
    """A side file's JSON object, empty when the file is absent."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy it again") from None
    return data if isinstance(data, dict) else {}


def _text(token: Any) -> str | None:
    """A special token, written as text or as an object with its content."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _chat_template(
    folder: Path, settings: Mapping[str, Any], core: tokenizers.Tokenizer
) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    stated = settings.get("chat_template")
    if isinstance(stated, list):  # several, by name
        named = {str(each.get("name")): each.get("template") for each in stated}
        stated = named.get("default")
    if isinstance(stated, str):
        return stated
    has_roles = all(core.token_to_id(token) is not None for token in _ROLE_TOKENS)
    return _ROLE_TEMPLATE if has_roles else None


def _environment() -> ImmutableSandboxedEnvironment:
    """The sandbox, whitespace rules and helpers that published templates are written for."""

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = strftime_now
    return env
