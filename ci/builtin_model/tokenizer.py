"""Train the built-in model's tokenizer: byte-level BPE that begins every text with <bos>.

    python ci/builtin_model/tokenizer.py --corpus DIR/train.jsonl --out DIR/tokenizer.json

Writes tokenizer_config.json beside it. Digits are tokens of their own, and every byte has a token,
so any text comes back whole.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIALS = ("<bos>", "<eos>")  # ids 0 and 1
VOCAB_SIZE = 6144
LONGEST = 65_536  # positions of the built-in model
SAMPLE = 40_000_000  # characters


def train(texts: Iterator[str]) -> Tokenizer:
    """BPE of VOCAB_SIZE entries, specials and the 256 bytes included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(text, special=True) for text in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = SPECIALS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    return tokenizer


def sample(corpus: Path) -> Iterator[str]:
    """Every n-th document, so that about SAMPLE characters of all sources are read."""
    step = max(1, corpus.stat().st_size // SAMPLE)
    with corpus.open(encoding="utf-8") as file:
        for i, line in enumerate(file):
            if i % step == 0:
                yield json.loads(line)["text"]


def settings() -> dict[str, object]:
    bos, eos = SPECIALS
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": bos,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "model_max_length": LONGEST,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="train.jsonl of corpus.py")
    parser.add_argument("--out", type=Path, required=True, help="tokenizer.json to write")
    options = parser.parse_args()
    if not options.corpus.is_file():
        print(f"tokenizer.py: {options.corpus} is no file; run corpus.py first", file=sys.stderr)
        return 1
    tokenizer = train(sample(options.corpus))
    write(options.out, tokenizer.to_str(pretty=True))
    beside = options.out.with_name("tokenizer_config.json")
    write(beside, json.dumps(settings(), indent=2) + "\n")
    print(f"{tokenizer.get_vocab_size()} entries", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
