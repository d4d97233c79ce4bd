"""Words of a command line into ops, cases, axes and implementations, or one sentence why not."""

from __future__ import annotations

import argparse
import ast
import difflib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, cast

from dsa_hal.case import Case, Inputs
from dsa_hal.errors import Absent, BadInput, ConfigError
from dsa_hal.registry import Impl, Op
from dsa_hal.selection import OPS, selection, use
from dsa_hal.target import Target


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """`unknown op 'topkk'; did you mean topk? known are ...`"""
    listed = sorted(known)
    close = difflib.get_close_matches(name, listed, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    return ConfigError(f"unknown {what} {name!r}; {hint}known are {', '.join(listed) or 'none'}")


def ops(names: Sequence[str]) -> list[Op[..., Any]]:
    """The named ops, or all."""
    for name in names:
        if name not in OPS:
            raise unknown("op", name, OPS)
    return [OPS[name] for name in names] or list(OPS.values())


def case(op: Op[..., Any], name: str) -> Case:
    for known in op.cases:
        if known.name == name:
            return known
    raise unknown(f"case of {op.name}", name, (c.name for c in op.cases))


def true_shape(op: Op[..., Any]) -> Case:
    """The case that axes on the command line change when no case is named: the op's first true
    shape of the model, or else its first case."""
    return next((c for c in op.cases if c.model), op.cases[0])


def implementations(op: Op[..., Any], names: Sequence[str]) -> list[Impl[..., Any]]:
    """The named implementations on the target in force; the reference may be named too. None named:
    every implementation but the reference."""
    registered = op.implementations(selection().target)
    for name in names:
        if name not in {impl.name for impl in registered}:
            known = (impl.name for impl in registered)
            raise unknown(f"implementation of {op.name} on {selection().target}", name, known)
    if names:
        return [impl for name in names for impl in registered if impl.name == name]
    return [impl for impl in registered if impl.name != "reference"] or list(registered)


@contextmanager
def target(name: str | None) -> Iterator[Target]:
    """The target of --backend, or the one in force; it may be absent."""
    if name is None:
        yield selection().target
    else:
        with use(backend=name) as chosen:
            yield chosen.target


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """As `target`, for those who execute: Absent is raised where its device is not here."""
    with target(name) as found:
        found.must_be_here()
        yield


# -- axes --------------------------------------------------------------------------------------


def axes_apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words without and with "=": an option that takes several names swallows axes behind it."""
    return [w for w in words if "=" not in w], [w for w in words if "=" in w]


def custom(op: Op[..., Any], base: Case, words: Sequence[str]) -> list[Case]:
    """`base` with axes replaced, as in `tokens=64 ties=lower`; `tokens=1,16,256` makes a case of
    each.

    Values are read by the type of the base's. Raises ConfigError for an axis the case has not, or a
    value that does not parse or that fits no input.
    """
    choices: dict[str, list[Any]] = {}
    for word in words:
        axis, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} is not of the form axis=value")
        if axis not in base.axes:
            raise unknown(f"axis of {op.name}", axis, base.axes)
        choices[axis] = [_value(axis, part, base.axes[axis]) for part in _parts(text, base, axis)]
    made = []
    for values in itertools.product(*choices.values()):
        changed = dict(zip(choices, values, strict=True))
        label = ",".join(f"{axis}={value}" for axis, value in changed.items())
        new = Case(f"{base.name}:{label}", {**base.axes, **changed}, base.model, seed=base.seed)
        inputs_of(op, new, "meta")
        made.append(new)
    return made


def inputs_of(op: Op[..., Any], case: Case, device: str) -> Inputs:
    """The case's arguments. Axes that were typed by hand may contradict each other in ways that
    only building the inputs shows: whatever that raises is the person's to read."""
    try:
        return case.make(op.inputs, device)
    except (ValueError, RuntimeError, IndexError, ZeroDivisionError, OverflowError) as error:
        axes = " ".join(f"{axis}={value}" for axis, value in case.axes.items())
        raise BadInput(f"{op.name}: axes {axes} make no inputs: {error}") from error


def _parts(text: str, base: Case, axis: str) -> list[str]:
    return [text] if isinstance(base.axes[axis], tuple | list) else text.split(",")


def _value(axis: str, text: str, like: Any) -> Any:
    def wrong(kind: str) -> ConfigError:
        return ConfigError(f"{axis}={text!r}: expected {kind}, as in {axis}={like}")

    if isinstance(like, bool):
        known = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in known:
            raise wrong("true or false")
        return known[text.lower()]
    if isinstance(like, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise wrong(f"a value of type {type(like).__name__}") from None
    if isinstance(like, int) and (not isinstance(value, int) or value < 0):
        raise wrong("a whole number of at least 0")
    if isinstance(like, float) and not isinstance(value, int | float):
        raise wrong("a number")
    if isinstance(like, tuple | list) and not isinstance(value, tuple | list):
        raise wrong("a list")
    return type(like)(value) if like is not None else value


# -- ranges of options -------------------------------------------------------------------------


def whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    """An argparse type: a whole number within bounds."""

    def parse(text: str) -> int:
        if not text.strip().lstrip("+-").isdigit() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {_range('a whole number', least, most)}"
            )
        return int(text)

    return parse


def numbers(least: int, most: float = math.inf) -> Callable[[str], list[int]]:
    """An argparse type: whole numbers within bounds, separated by commas, each once."""
    one = whole(least, most)
    return lambda text: list(dict.fromkeys(one(part) for part in text.split(",")))


def real(least: float, most: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number within bounds; `above` leaves the lower bound out."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not least <= value <= most or (above and value == least):
            wish = _range("a number", least, most, above)
            raise argparse.ArgumentTypeError(f"{text!r} is not {wish}")
        return value

    return parse


def _range(kind: str, least: float, most: float, above: bool = False) -> str:
    lower = f"above {least:g}" if above else f"of at least {least:g}"
    return f"{kind} {lower}" + (f" and at most {most:g}" if math.isfinite(most) else "")


def picture(module: str, name: str) -> Callable[..., bytes]:
    """The function `name` of dsa_hal.cli.`module`, which draws with matplotlib. Asked for before
    long work, so that it is said then where that is absent."""
    try:
        return cast(Callable[..., bytes], getattr(import_module(f"dsa_hal.cli.{module}"), name))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise Absent("--plot needs matplotlib; pip install 'dsa-hal[report]'") from None
