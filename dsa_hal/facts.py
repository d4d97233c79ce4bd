"""What a predicate may know of a call: shapes, dtypes and plain arguments, as one hashable key.

Selection remembers its answers under this key, so that a called op does not ask every predicate on
every call. The key function is written for an op's own arguments, like the methods of a dataclass,
because a loop over arguments would cost more than the predicates do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

_PARTS: dict[Any, str] = {
    Tensor: "{0}.shape, {0}.dtype",
    Tensor | None: "{0} if {0} is None else ({0}.shape, {0}.dtype)",
    list[Tensor]: "tuple([(t.shape, t.dtype) for t in {0}])",
}


def facts_of(fn: Callable[..., Any]) -> Callable[..., tuple[Hashable, ...]]:
    """A function with the arguments of `fn` that returns the key of a call. A mistaken call raises
    the TypeError that `fn` would raise."""
    arguments, parts, defaults = [], [], {}
    keyword_only = False
    for name, parameter in inspect.signature(fn, eval_str=True).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            arguments.append("*")
            keyword_only = True
        has_default = parameter.default is not parameter.empty
        arguments.append(f"{name}=_{name}" if has_default else name)
        defaults[f"_{name}"] = parameter.default
        parts.append(_PARTS.get(parameter.annotation, "{0}").format(name))
    source = f"def {fn.__name__}({', '.join(arguments)}): return ({', '.join(parts)},)"
    exec(source, defaults)
    made: Callable[..., tuple[Hashable, ...]] = defaults[fn.__name__]
    return made
