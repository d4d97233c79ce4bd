"""The ROCm backend as far as it shows without a device: what is served, the configurations, FP8's
dialects, and how the device is recognised."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from cli_process import environment
from foreign import foreign

from dsa_hal import selection as choosing
from dsa_hal import use
from dsa_hal.autotune.space import Space
from dsa_hal.backends import rocm
from dsa_hal.backends.portable import processors
from dsa_hal.backends.portable.dialect import is_fnuz, to_fnuz
from dsa_hal.selection import OPS, selection
from dsa_hal.support import support
from dsa_hal.target import Target, architectures, implements, probe, stand_in

ARCHES = ("gfx950", "gfx942")
TUNED = sorted((Path(rocm.__file__).parent / "tuned").glob("*.yaml"))


# -- what is served ----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHES)
def test_every_case_of_every_op_is_served(arch: str) -> None:
    """By an implementation of its own or by parts; none by the reference. Refused are int8 and
    pools in split order, which are other devices'."""
    pytest.importorskip("triton")
    with use(target=f"rocm:{arch}"):
        rows = support()
    for op in OPS.values():
        served = {case for row in rows if row.op == op.name for case in row.served}
        refused = [case for case in op.cases if case.name not in served]
        assert all(foreign(case) for case in refused), op.name
        caches = [c for c in op.cases if foreign(c) and "pages" in c.make(op.inputs, "meta")]
        assert not served & {case.name for case in caches}, op.name
    assert not [row for row in rows if row.impl.startswith("reference")]
    for row in rows:
        assert all(row.refused.values()), f"{row.op} {row.impl}: a refusal without a sentence"


def test_an_op_that_cuda_has_a_file_for_has_one_here() -> None:
    assert implements("cuda") <= implements("rocm")


def test_other_architectures_are_refused() -> None:
    pytest.importorskip("triton")
    with use(target=Target("rocm", "gfx90a", "cuda")):
        for op in OPS.values():
            for verdict in selection().verdicts(op):
                if verdict.impl.name == "triton":
                    assert verdict.reason == "made for gfx950, gfx942, this is gfx90a", op.name


def test_torchs_own_triton_for_rocm_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its distribution has another name than Triton's for CUDA."""

    def version(name: str) -> str:
        if name == "triton-rocm":
            return "3.6.0+rocm7.2"
        raise PackageNotFoundError(name)

    monkeypatch.setattr(choosing, "version", version)
    monkeypatch.setattr(choosing, "_missing", choosing._missing.__wrapped__)  # it remembers
    with use(target="rocm:gfx950"):
        verdicts = {v.impl.name: v for v in selection().verdicts(OPS["sparse_mla_paged"])}
    assert verdicts["triton"].question == "ok"
    assert "needs triton-rocm>=3.7" in str(verdicts["gluon"].reason)


# -- configurations ----------------------------------------------------------------------------


def spaces() -> dict[str, Space[Any]]:
    """The spaces for which the backend states a list of its own."""
    from dsa_hal.backends.rocm import _tiles  # noqa: F401

    return {name: space for name, space in Space.ALL.items() if "rocm" in space._own}


def facts(space: Space[Any]) -> list[dict[str, int]]:
    """Calls of every kind that the space is asked about."""
    names = list(inspect.signature(space._own["rocm"]).parameters)[1:]
    sizes = {
        "rows": (1, 17, 100, 4096), "n": (128, 8192), "bytes": (1, 2, 4), "size": (2, 4),
        "width": (32, 128, 192, 512, 576), "heads": (1, 16, 64, 128), "tokens": (1, 64, 4096),
        "dim": (64, 128), "k": (64, 2048), "processors": (256, 304),
    }  # fmt: skip
    made: list[dict[str, int]] = [{}]
    for name in names:
        made = [{**one, name: size} for one in made for size in sizes[name]]
    return made


@pytest.mark.parametrize("arch", ARCHES)
def test_every_configuration_can_be_launched(arch: str) -> None:
    """Powers of two, at most 1024 lanes, options that AMD's compiler knows; operands of products
    fit LDS; the list is not NVIDIA's."""
    found = spaces()
    assert {"fp8_gemm/triton", "sparse_mla_paged/triton", "rms_norm/triton"} <= found.keys()
    limits = architectures("rocm")[arch]
    with use(target=f"rocm:{arch}"):
        for name, space in found.items():
            for call in facts(space):
                choices = space.choices(**call)
                assert choices and len(set(choices)) == len(choices), (name, call)
                for config in choices:
                    mine = vars(config)
                    told = config.options
                    assert 64 * told["num_warps"] <= 1024, (name, config)
                    assert told.get("matrix_instr_nonkdim", 16) in (16, 32)
                    assert "kpack" not in told or arch == "gfx942"
                    for size in ("bm", "bn", "bk", "keys", "heads", "warps"):
                        value = mine.get(size) or 1
                        assert value & (value - 1) == 0, (name, config)
                    if "bm" in mine:
                        held = mine["stages"] * (mine["bm"] + mine["bn"]) * mine["bk"]
                        assert held * call["bytes"] <= limits.shared, (name, config)


def test_an_old_compiler_has_smaller_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 spills where 3.7 does not: tiles of 64 rows by 512 columns on gfx950."""
    from dsa_hal.backends.rocm import _tiles

    paged, whole = spaces()["sparse_mla_paged/triton"], spaces()["dense_mla/triton"]

    def first() -> tuple[int, int]:
        tile = paged.choices(heads=128, width=512, bytes=2)[0]
        rows: int = whole.choices(rows=128, width=576, size=2)[0].rows
        return tile.heads * tile.keys, rows

    with use(target="rocm:gfx950"):
        monkeypatch.setattr(_tiles, "_spendthrift", lambda: False)
        assert first() == (64 * 32, 64)
        monkeypatch.setattr(_tiles, "_spendthrift", lambda: True)
        assert first() == (64 * 16, 32)


def test_the_number_of_processors_is_the_targets() -> None:
    for arch in ARCHES:
        with use(target=f"rocm:{arch}"):
            count = processors.count(torch.device("meta"))
            assert count == architectures("rocm")[arch].processors


# -- FP8's dialects ----------------------------------------------------------------------------


def codes() -> torch.Tensor:
    return torch.arange(256, dtype=torch.int32).to(torch.uint8)


def test_the_dialect_is_a_fact_of_the_target() -> None:
    for text, fnuz in (("rocm:gfx950", False), ("rocm:gfx942", True), ("cuda:sm90", False)):
        with use(target=text):
            assert is_fnuz() is fnuz, text


def test_all_codes_convert_exactly() -> None:
    """Each number of e4m3fn times its scale is the same number after the conversion, bit by bit;
    NaN is NaN, and -0, which e4m3fnuz has not, is 0."""
    values = codes().view(torch.float8_e4m3fn)
    made, scale = to_fnuz(values, torch.tensor([0.25, 3.0]))
    assert made.dtype == torch.float8_e4m3fnuz and scale.tolist() == [0.5, 6.0]
    want, got = values.float(), 2 * made.float()
    assert torch.equal(want.isnan(), got.isnan()) and int(got.isnan().sum()) == 2
    known = ~want.isnan()
    assert torch.equal(want[known], got[known])
    bits = made.view(torch.uint8)
    assert set(bits[~known].tolist()) == {0x80} and int(bits[0x80]) == 0
    kept = known & (codes() != 0x80)
    assert torch.equal(bits[kept], codes()[kept]), "every other code stays as it is"
    assert made[known].float().abs().max() == 224, "the range of 240 holds them"


def test_programs_convert_as_torch_does() -> None:
    """The conversion inside Triton's programs, and the measure of a product, on all pairs."""
    pytest.importorskip("triton")
    code = """
    import torch
    from dsa_hal.backends.portable import interpreter
    interpreter.start()
    import triton, triton.language as tl
    from dsa_hal.backends.portable._kernels.fp8 import spoken, understood
    from dsa_hal.backends.portable.dialect import to_fnuz

    @triton.jit
    def convert(x, bits, y, FNUZ: tl.constexpr):
        at = tl.arange(0, 256)
        code = tl.load(x + at)
        made = spoken(code, FNUZ)
        tl.store(bits + at, made.to(tl.uint8, bitcast=True))
        tl.store(y + at, understood(made.to(tl.float32), code, FNUZ))

    x = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    for fnuz in (True, False):
        bits, y = torch.empty(256, dtype=torch.uint8), torch.empty(256)
        convert[(1,)](x, bits, y, FNUZ=fnuz)
        want = to_fnuz(x, torch.ones(1))[0] if fnuz else x
        assert torch.equal(bits, want.view(torch.uint8))
        assert torch.equal(y.nan_to_num(), (4 if fnuz else 1) * want.float().nan_to_num())
    print("right")
    """
    asked = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=200,
        env=environment(), check=False,
    )  # fmt: skip
    assert asked.stdout.strip() == "right", asked.stderr


# -- the device --------------------------------------------------------------------------------


def test_the_device_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    assert "built without ROCm" in str(rocm.target())
    monkeypatch.setattr(torch.version, "hip", "7.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "rocm-smi" in str(rocm.target())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    name = SimpleNamespace(gcnArchName="gfx950:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "AMD Instinct MI355X")
    probe.cache_clear()
    try:
        target = probe("rocm")
        assert not isinstance(target, str) and not target.absent
        assert (str(target), target.device) == ("rocm:gfx950", "cuda")
        assert target.limits is architectures("rocm")["gfx950"]
    finally:
        probe.cache_clear()
    assert "ROCm 7.2" in str(rocm.driver())


PLATFORMS = re.compile(r"(cuda|rocm|hip|npu|gfx\w+|sm\d+|910\w|a2|a3|950)(:.*)?")
"""A device, a backend or an architecture by name."""

ITSELF = {"h200.py"}
"""The suite of one device."""


def asked(tree: ast.AST) -> list[str]:
    """What a file compares with the name of a platform, or reads of torch's build."""
    found = []
    for node in ast.walk(tree):
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            sides = node.args if node.func.attr in ("startswith", "endswith") else []
        elif isinstance(node, ast.Attribute) and node.attr in ("hip", "is_rocm", "is_hip"):
            found.append(ast.unparse(node))
        for side in (inner for each in sides for inner in ast.walk(each)):
            if isinstance(side, ast.Constant) and PLATFORMS.fullmatch(str(side.value)):
                found.append(ast.unparse(node))
    return found


def test_nobody_outside_backends_asks_which_platform_it_is() -> None:
    root = Path(__file__).parent.parent
    for folder in ("dsa_hal", "ops", "model", "autotune"):
        for path in (root / folder).rglob("*.py"):
            if not any(parent.is_symlink() for parent in path.parents) and path.name not in ITSELF:
                assert asked(ast.parse(path.read_text())) == [], path
    for planted in ("x if target.backend == 'rocm' else y", "arch.startswith('gfx950')",
                    "torch.version.hip is None", "device.type in ('cuda', 'npu')"):  # fmt: skip
        assert asked(ast.parse(planted)), planted


# -- no number is NVIDIA's ---------------------------------------------------------------------


def test_every_program_of_the_model_has_lists_of_its_own() -> None:
    """The portable lists were measured on an H200: only what the model never launches is asked of
    them."""
    pytest.importorskip("triton")
    for arch in ARCHES:
        target = stand_in(f"rocm:{arch}", "meta")
        for op in OPS.values():
            op.implementations(target)
    borrowed = {name for name, space in Space.ALL.items() if "rocm" not in space._own}
    nvidias = {name for name in borrowed if not name.endswith(("/cuda", "/gluon"))}
    assert nvidias <= {"sparse_mla/triton:steps"}, "fp32 alone; the model's attention is bf16"


def test_the_shipped_tables_are_of_their_own_architecture() -> None:
    """Static, derived from nothing, of a device that the backend states, and no time in them is one
    of another table's."""
    root = Path(rocm.__file__).parent.parent
    measured = times(yaml.safe_load((root / "cuda" / "tuned" / "h200.yaml").read_text()))
    tables = {path.stem: yaml.safe_load(path.read_text()) for path in TUNED}
    assert "gfx950" in tables and tables.keys() <= set(ARCHES)
    for arch, table in tables.items():
        device = architectures("rocm")[arch].device
        assert table["stamp"] == {
            "backend": "rocm", "arch": arch, "device": device, "static": True
        }  # fmt: skip
        mine = times(table)
        for other in (measured, *(times(tables[a]) for a in tables if a != arch)):
            shared = [key for key in mine if mine[key] == other.get(key)]
            assert len(shared) <= len(mine) // 20, f"{arch}: {shared[:3]}"


def times(table: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    """(op, call, implementation) -> microseconds."""
    return {
        (op, str(row["call"]), impl): us
        for op, entry in table["ops"].items()
        for row in entry["winners"]
        for impl, us in row["us"].items()
    }


@pytest.mark.parametrize("path", TUNED, ids=lambda path: path.stem)
def test_every_op_with_a_space_is_tuned_statically(path: Path) -> None:
    pytest.importorskip("triton")
    arch = path.stem
    target = stand_in(f"rocm:{arch}", "meta")
    wanted = set()
    for op in OPS.values():
        names = {impl.name for impl in op.implementations(target) if arch in impl.arch}
        own = {n for n in Space.ALL if n.partition(":")[0] in {f"{op.name}/{i}" for i in names}}
        wanted |= {op.name} if own and any(case.model for case in op.cases) else set()
    assert wanted - yaml.safe_load(path.read_text())["ops"].keys() == set()
