"""Which cases a memory or race checker runs: `python3 ci/sanitized.py BACKEND [OP ...]` prints a
line per kernel of our own, op, implementation, and the costliest of its small cases."""

from __future__ import annotations

import sys

from dsa_hal import ops
from dsa_hal.matrix import Limit, cost_of, rows
from dsa_hal.selection import OPS, use

SMALL = Limit(flop=3e8, bytes=8e6)
"""A checker slows a kernel down a hundred times."""

KERNELS = ("triton", "gluon", "cuda")
"""Names, or beginnings of names, of implementations with kernels of our own."""

CASES = 3


def main(backend: str, names: list[str]) -> None:
    with use(backend=backend):
        chosen = [getattr(ops, name) for name in names] or list(OPS.values())
        found: dict[tuple[str, str], list[tuple[float, str]]] = {}
        for row in rows(chosen, SMALL):
            if row.impl.name.startswith(KERNELS):
                inputs = row.case.make(row.op.inputs, "meta")
                if row.impl.why_not(**inputs) is None:
                    cost = cost_of(row.op, row.case)
                    own = found.setdefault((row.op.name, row.impl.name), [])
                    own.append((cost.flop + cost.bytes, row.case.name))
    for (op, impl), cases in found.items():
        largest = sorted(cases, reverse=True)[:CASES]
        print(op, impl, *(name for _, name in largest))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
