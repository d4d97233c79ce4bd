"""The backend's own code under the wheel: which calls it makes, on tensors without data (at true
size) and on the processor's (small). Each run is made once per process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dsa_hal.ops  # noqa: F401  declares every op
from ci.ascend.emulated import emulated
from ci.ascend.wheel.calls import Call, noted
from ci.ascend.wheel.outlines import Outline
from dsa_hal import use
from dsa_hal.case import Case, run
from dsa_hal.matrix import Limit, cost_of
from dsa_hal.model.builtin import builtin_checkpoint
from dsa_hal.model.checkpoint import Checkpoint
from dsa_hal.model.config import ModelConfig
from dsa_hal.model.precision import Precision
from dsa_hal.model.synthetic import PUBLISHED
from dsa_hal.model.transformer import Transformer
from dsa_hal.registry import Impl, Op
from dsa_hal.selection import OPS, REFERENCE
from dsa_hal.target import Target, stand_in

ARCHES = ("a2", "950")
"""Those whose constraints differ; a3 takes what a2 takes."""

SMALL = Limit(flop=1e8, bytes=3e6)
"""What the processor computes in milliseconds."""


class Form(NamedTuple):
    """How a model is held: implementations named, and formats."""

    impls: dict[str, str]
    precision: Precision | None


FORMS = {
    "bf16": Form({}, None),
    "int8": Form({"pack_weight": "w8a8"}, Precision(latent_cache="int8", index_cache="int8")),
}


@dataclass
class Made:
    """What a run gave: its calls, and what was wrong."""

    calls: list[Call] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


# -- the matrix ---------------------------------------------------------------------------------


def rows(target: Target) -> Iterator[tuple[Op[..., Any], Impl[..., Any], Case]]:
    """Every case of every implementation that may call torch_npu: plain torch on the device, which
    is named "torch", asks the wheel for nothing."""
    for op in OPS.values():
        for impl in op.implementations(target):
            fits = impl.backend == target.backend and (not impl.arch or target.arch in impl.arch)
            if fits and impl.name != "torch":
                yield from ((op, impl, case) for case in op.cases)


@cache
def matrix(arch: str) -> Made:
    """All cases at their true sizes, on tensors without data; of small ones the results have the
    shapes and dtypes that the references' have."""
    made, target = Made(), stand_in(f"npu:{arch}", "meta")
    with use(target=target):
        for op, impl, case in rows(target):
            inputs = case.make(op.inputs, "meta")
            if impl.why_not(**inputs) is not None:
                continue
            label = f"{op.name} {impl.label}, case {case.name}"
            try:
                with noted() as calls:
                    got = run(impl.fn, inputs, op.mutates)
            except Exception as error:
                made.problems.append(f"{label}: {type(error).__name__}: {error}")
                continue
            made.calls += calls
            want = _outline(op.name, case.name)
            if want is not None and [_form(t) for t in got] != want:
                made.problems.append(f"{label}: gives {[_form(t) for t in got]}, wanted {want}")
    return made


@cache
def _outline(name: str, case_name: str) -> list[str] | None:
    """Shapes and dtypes of the reference's results; None of large cases, which take it long. (How
    weights are packed is each backend's own: `pack_weight` has none to compare with.)"""
    op = OPS[name]
    case = next(case for case in op.cases if case.name == case_name)
    if name.startswith("pack_") or not SMALL.admits(cost_of(op, case)):
        return None
    with use(backend=REFERENCE.backend):
        return [_form(t) for t in run(op.reference, case.make(op.inputs, "cpu"), op.mutates)]


def _form(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"


# -- models -------------------------------------------------------------------------------------


@cache
def full_width(arch: str, form: str) -> Made:
    """A dense layer and a layer of experts of the published model, and its head: prompts in chunks,
    one alone and two together, then decoding for three requests, one and two tokens a step."""
    config = replace(PUBLISHED, num_hidden_layers=2, first_k_dense_replace=1)
    return _walk(config, arch, form, [3000, 5, 700], [(1,), (2,)])


@cache
def builtin(arch: str, form: str) -> Made:
    """All layers of the built-in model, in the same way."""
    with Checkpoint.open(str(builtin_checkpoint())) as checkpoint:
        config = checkpoint.config
    return _walk(config, arch, form, [300, 5], [(1,)])


def _walk(
    config: ModelConfig, arch: str, form: str, prompts: list[int], steps: list[tuple[int]]
) -> Made:
    impls, precision = FORMS[form]
    made = Made()
    with use(target=stand_in(f"npu:{arch}", "meta"), **impls):
        model = Transformer(Outline(config), device="meta", precision=precision)  # type: ignore[arg-type]
        cache, contexts = model.new_cache([length + 10 for length in prompts])
        tokens = [torch.zeros(length, dtype=torch.int64) for length in prompts]
        with noted() as made.calls:
            for _, logits in model.prefill(cache, contexts, tokens, chunk=1024):
                _is_logits(made, logits, config)
            for (each,) in steps:
                more = torch.zeros(len(prompts), each, dtype=torch.int64)
                _is_logits(made, model.decode(cache, contexts, more), config)
    return made


def _is_logits(made: Made, logits: Tensor, config: ModelConfig) -> None:
    if logits.dtype != torch.float32 or logits.shape[-1] != config.vocab_size:
        made.problems.append(f"logits are {_form(logits)}")


# -- with data ----------------------------------------------------------------------------------


@cache
def samples(arch: str) -> tuple[Call, ...]:
    """Calls with data, one of each kind that the backend makes: of small cases, and of the built-in
    model on a short prompt in both forms. The emulated ops compute."""
    found: list[Call] = []
    with emulated(arch) as chosen:
        for op, impl, case in rows(chosen.target):
            if not SMALL.admits(cost_of(op, case)):
                continue
            inputs = case.make(op.inputs, "cpu")
            if impl.why_not(**inputs) is None:
                with noted() as calls:
                    run(impl.fn, inputs, op.mutates)
                found += calls
    for impls, precision in FORMS.values():
        with emulated(arch, **impls), torch.inference_mode(False):
            model = Transformer.from_pretrained(builtin_checkpoint(), precision=precision)
            cache, contexts = model.new_cache([48, 48])
            prompts = [torch.arange(40), torch.arange(30)]
            with noted() as calls:
                list(model.prefill(cache, contexts, prompts))
                model.decode(cache, contexts, torch.ones(2, 1, dtype=torch.int64))
            found += calls
    kinds = {_kind(call): call for call in found}
    return tuple(kinds.values())


def _kind(call: Call) -> tuple[Any, ...]:
    """What calls of one kind share: dtypes and ranks of tensors, and all that is no number."""

    def told(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype, value.dim()
        if isinstance(value, list | tuple):
            return tuple(map(told, value))
        return None if isinstance(value, int | float) and not isinstance(value, bool) else value

    return call.op, *((name, told(value)) for name, value in call.arguments.items())
