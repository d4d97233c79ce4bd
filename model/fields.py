"""Reading one JSON object field by field, refusing what is missing, mistyped or unknown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from dsa_hal.errors import ConfigError

T = TypeVar("T")
_REQUIRED: Any = object()


class Fields:
    """Typed access to `data`; every ConfigError starts with `source`, the file it came from."""

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        self.data, self.source = data, source

    def refuse(self, text: str) -> NoReturn:
        raise ConfigError(f"{self.source}: {text}")

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self.data.get(name, default)
        if value is _REQUIRED:
            self.refuse(f"the required field {name} is missing; take it from the published config")
        return value

    def integer(self, name: str, least: int, default: Any = _REQUIRED) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.refuse(f"{name} is {value!r}; it must be an integer of at least {least}")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        value = self.get(name, default)
        valid = isinstance(value, int | float) and not isinstance(value, bool)
        if not valid or not math.isfinite(value) or value <= 0:
            self.refuse(f"{name} is {value!r}; it must be a finite number above 0")
        return float(value)

    def choice(self, name: str, known: Sequence[T], default: Any = _REQUIRED) -> T:
        value = self.get(name, default)
        for each in known:
            if type(value) is type(each) and value == each:
                return each
        listed = ", ".join(repr(each) for each in known)
        self.refuse(f"{name} is {value!r}, which is not supported; known: {listed}")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id, a list of ids, or null."""
        value = self.data.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for each in ids:
            if isinstance(each, bool) or not isinstance(each, int) or each < 0:
                self.refuse(f"{name} is {value!r}; it must be a token id, a list of them, or null")
        return tuple(ids)

    def strings(self, name: str) -> tuple[str, ...]:
        """A list of strings, or nothing."""
        value = self.data.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            self.refuse(f"{name} is {value!r}; it must be a list of strings")
        return tuple(value)
