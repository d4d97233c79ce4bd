"""The tokenizer: round trips, text that arrives in bytes, chat templates, broken files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from random_model import CONFIG, byte_tokenizer
from tokenizers import AddedToken

from dsa_hal.errors import BadInput, CheckpointError
from dsa_hal.model.tokenizer import Tokenizer

TEXT = "Zwölf Boxkämpfer 世界 🙂 \t\n end"
TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
<user>{{ message['content'] | tojson }}
    {%- elif message['role'] == 'assistant' %}
<answer>{{ message.content }}{{ eos_token }}
    {%- else %}
        {{- raise_exception('no such role: ' + message['role']) }}
    {%- endif %}
    {%- if loop.last %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<answer>{% endif %}"""
CHAT = [
    {"role": "user", "content": "grüß <b> 'dich'"},
    {"role": "assistant", "content": "hallo"},
    {"role": "user", "content": "und?"},
]


def write(folder: Path, settings: dict[str, Any] | None = None, *more: str) -> Path:
    core = byte_tokenizer()
    core.add_special_tokens([AddedToken(text, special=True) for text in more])
    core.save(str(folder / "tokenizer.json"))
    bos = {"__type": "AddedToken", "content": "<bos>", "lstrip": False, "rstrip": False}
    stated = {"bos_token": bos, "eos_token": "<eos>"} | (settings or {})
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    return folder


def test_round_trip_and_special_tokens(tmp_path: Path) -> None:
    tok = Tokenizer.load(write(tmp_path), CONFIG)
    ids = tok.encode(TEXT)
    assert ids[0] == tok.bos_id == 0 and len(ids) == 1 + len(TEXT.encode())
    assert tok.encode(TEXT, add_bos=False) == ids[1:]
    assert tok.encode("<bos>" + TEXT) == ids
    assert tok.decode(ids) == TEXT
    assert tok.encode("a<eos>", add_bos=False)[-1:] == [1]
    assert tok.eos_ids == (1,) and tok.vocab_size == 258 and tok.chat_template is None


def test_ends_of_text_are_collected(tmp_path: Path) -> None:
    write(tmp_path, {"eos_token": "<end>"}, "<end>")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 9]}')
    assert Tokenizer.load(tmp_path).eos_ids == (1, 9, 258)


def test_stream_never_breaks_a_character(tmp_path: Path) -> None:
    tok = Tokenizer.load(write(tmp_path))
    stream = tok.stream()
    pieces = [stream.push(token) for token in tok.encode(TEXT)]
    assert "".join(pieces) == TEXT and stream.finish() == ""
    assert "世" in pieces and "🙂" in pieces


def test_stream_of_noise_loses_nothing(tmp_path: Path) -> None:
    tok = Tokenizer.load(write(tmp_path))
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(CONFIG.vocab_size) for _ in range(40)]
        stream = tok.stream()
        pieces = [stream.push(token) for token in ids]
        assert "".join(pieces) + stream.finish() == tok.decode(ids)


@pytest.mark.parametrize("place", ["config", "named", "file"])
def test_chat_template_agrees_with_transformers(tmp_path: Path, place: str) -> None:
    from transformers import PreTrainedTokenizerFast

    stated: dict[str, Any] = {"config": {"chat_template": TEMPLATE}}.get(place, {})
    if place == "named":
        named = [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]
        stated = {"chat_template": named}
    write(tmp_path, stated)
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    ours = Tokenizer.load(tmp_path).encode_chat(CHAT)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = theirs.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True, chat_template=TEMPLATE
    )
    assert ours == theirs.encode(text, add_special_tokens=False)
    assert ours[0] == 0 and ours.count(0) == 1


def test_deepseeks_role_tokens_need_no_template(tmp_path: Path) -> None:
    user, assistant, closed = "<｜User｜>", "<｜Assistant｜>", "</think>"  # noqa: RUF001
    tok = Tokenizer.load(write(tmp_path, None, user, assistant, closed))
    want = f"<bos>Be brief.{user}one{assistant}{closed}1<eos>{user}two{assistant}{closed}"
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
    ]
    assert tok.encode_chat(chat) == tok.encode(want, add_bos=False)
    with pytest.raises(BadInput, match="unknown role tool"):
        tok.encode_chat([{"role": "tool", "content": "x"}])


def test_template_failures_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no chat template; give the prompt as plain text"):
        Tokenizer.load(write(tmp_path)).encode_chat(CHAT)
    write(tmp_path, {"chat_template": TEMPLATE})
    with pytest.raises(BadInput, match="refuses these messages: no such role: tool"):
        Tokenizer.load(tmp_path).encode_chat([{"role": "tool", "content": "x"}])
    write(tmp_path, {"chat_template": "{% if %}"})
    with pytest.raises(CheckpointError, match="chat template is faulty"):
        Tokenizer.load(tmp_path).encode_chat(CHAT)
    write(tmp_path, {"chat_template": "{{ ''.__class__.__mro__ }}"})
    with pytest.raises(BadInput, match="unsafe"):
        Tokenizer.load(tmp_path).encode_chat(CHAT)


def test_missing_damaged_or_foreign_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json; copy tokenizer\.json"):
        Tokenizer.load(tmp_path)
    write(tmp_path, None, *(f"<extra{i}>" for i in range(127)))
    with pytest.raises(CheckpointError, match="has 385 tokens, but the model's vocab_size is 384"):
        Tokenizer.load(tmp_path, CONFIG)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match="is damaged"):
        Tokenizer.load(tmp_path)
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.load(tmp_path)
