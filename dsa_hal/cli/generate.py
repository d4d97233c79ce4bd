"""Continue text with a checkpoint, or with the small built-in model if none is named.

The generated text alone goes to stdout, as it comes; everything else goes to stderr. A checkpoint
that has a chat template is asked as a chat, others continue the prompt as it is; --chat and --raw
decide otherwise. Temperature and top-p are the checkpoint's own unless given; without any, text is
greedy.

  dsa-hal generate --prompt "Attention is"
  dsa-hal generate --model DeepSeek-V3.2-Exp --interactive
  dsa-hal generate --model DeepSeek-V3.2-Exp --input-file prompts.txt --jsonl
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from dsa_hal.cli import choose, output
from dsa_hal.cli.interactive import converse
from dsa_hal.cli.session import Session, Settings, Work
from dsa_hal.cli.writer import JsonLines, Text
from dsa_hal.errors import BadInput, ConfigError
from dsa_hal.model.builtin import builtin_checkpoint
from dsa_hal.model.precision import FORMATS, Precision
from dsa_hal.selection import current

BATCH = 8
"""Prompts of a file that are continued together, as in the model's demo code."""


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="checkpoint folder; default: the built-in model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="what to continue or answer")
    source.add_argument("--input-file", metavar="FILE", help='a prompt per line; "-" is stdin')
    source.add_argument("--interactive", action="store_true", help="a conversation; Ctrl-D ends it")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--chat", action="store_true", help="insist on the chat template")
    form.add_argument("--raw", action="store_true", help="prompts as they are, no chat template")
    add("--max-new-tokens", type=choose.whole(1), default=200, metavar="N", help="default 200")
    add("--temperature", type=choose.real(0), metavar="X", help="0 is greedy; default: the model's")
    add(
        "--top-p",
        type=choose.real(0, 1, above=True),
        metavar="X",
        help="default: the model's, or 1",
    )
    add("--repetition-penalty", type=choose.real(0, above=True), metavar="X",
        help="above 1: tokens that are there already become less likely; default: the model's,"
        " or 1 = none")  # fmt: skip
    add("--seed", type=choose.whole(0, 2**63 - 1), default=0, metavar="N", help="default 0")
    add("--precision", type=_precision, metavar="P",
        help=f"of the weights: {', '.join(FORMATS)}; or apart, as in"
        " weights=bf16,index_cache=fp8,latent_cache=bf16; default: the checkpoint's")  # fmt: skip
    add("--backend", metavar="NAME", help="instead of DSA_HAL_BACKEND's")
    add("--max-context", type=choose.whole(1), metavar="N", help="a limit below the model's own")
    add("--prefill-chunk", type=choose.whole(1), default=1024, metavar="N",
        help="prompt tokens per step; fewer need less memory; default 1024")  # fmt: skip
    add("--no-recording", action="store_true",
        help="let the host launch every step, also where the device could replay one")  # fmt: skip
    add(
        "--jsonl",
        action="store_true",
        help="a JSON object per prompt and line: prompt, text, tokens",
    )
    add("--check-finite", action="store_true", help="refuse weights that are NaN or infinite")
    add("--explain", action="store_true", help="tell which implementation serves each op")


def run(args: argparse.Namespace) -> int:
    if args.interactive and args.jsonl:
        raise BadInput("--jsonl writes a record per prompt; it does not go with --interactive")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without UTF-8 shows "?" and goes on
        sys.stdout.reconfigure(errors="replace")
    with choose.backend(args.backend):
        current()  # a backend that is not here is said before anything is read
        texts = _prompts(args)
        path = args.model
        if path is None:
            output.note(
                "no --model: the built-in model, small and trained on technical documentation"
            )
            path = builtin_checkpoint()
        session = Session.open(path, _settings(args))
        if args.interactive:
            session.load(args.precision, args.check_finite, args.explain)
            converse(session)
            return 0
        prompts = [session.encode(text, _place(args, at)) for at, text in enumerate(texts)]
        session.load(args.precision, args.check_finite, args.explain)
        work = Work()
        for start in range(0, len(prompts), BATCH):
            some = slice(start, start + BATCH)
            writer = JsonLines(texts[some], session.tokenizer) if args.jsonl else Text(
                session.tokenizer, len(prompts[some])
            )  # fmt: skip
            work += session.generate(prompts[some], writer, first=start)
        output.note(str(work))
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    return Settings(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        prefill_chunk=args.prefill_chunk,
        max_context=args.max_context,
        chat=True if args.chat else False if args.raw else None,
        record=not args.no_recording,
    )


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.interactive:
        return []
    if args.prompt is not None:
        try:
            args.prompt.encode()
        except UnicodeEncodeError:
            raise BadInput("--prompt is not UTF-8 text") from None
        return [args.prompt]
    texts = [line for line in output.read_text(args.input_file).splitlines() if line.strip()]
    if not texts:
        raise BadInput(f"{_file(args)} holds no prompt; it needs one per line")
    return texts


def _file(args: argparse.Namespace) -> str:
    return "stdin" if args.input_file == "-" else str(args.input_file)


def _place(args: argparse.Namespace, at: int) -> str:
    return "--prompt" if args.prompt is not None else f"prompt {at + 1} of {_file(args)}"


def _precision(text: str) -> Precision:
    """An argparse type: "bf16", or fields apart."""
    if "=" not in text:
        text = f"weights={text}"
    pairs = [item.partition("=") for item in text.split(",")]
    try:
        return Precision(**{name.strip(): value.strip() for name, _, value in pairs})
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except TypeError:
        fields = ", ".join(Precision.__dataclass_fields__)
        raise argparse.ArgumentTypeError(f"{text!r} names more than {fields}") from None
