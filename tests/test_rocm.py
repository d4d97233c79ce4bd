"""The ROCm backend as far as it shows without a device: what is served, the configurations, FP8's
dialects, and how the device is recognised."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_process import environment

from dsa_hal import use
from dsa_hal.autotune.space import Space
from dsa_hal.backends import rocm
from dsa_hal.backends.portable import processors
from dsa_hal.backends.portable.dialect import is_fnuz, to_fnuz
from dsa_hal.selection import OPS, selection
from dsa_hal.support import support
from dsa_hal.target import Target, architectures, implements, probe

ARCHES = ("gfx950", "gfx942")


# -- what is served ----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHES)
def test_every_case_of_every_op_is_served(arch: str) -> None:
    """By an implementation of its own or by parts; none by the reference."""
    pytest.importorskip("triton")
    with use(target=f"rocm:{arch}"):
        rows = support()
    for op in OPS.values():
        served = {case for row in rows if row.op == op.name for case in row.served}
        assert served == {case.name for case in op.cases}, op.name
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


def test_nobody_outside_backends_asks_which_platform_it_is() -> None:
    """Names of architectures and of AMD's options stay in backends and in data."""
    root = Path(__file__).parent.parent
    allowed = {
        "env.py",
        "target.py",
        "space.py",
        "tune.py",
        "__init__.py",
    }  # words of help, options
    for folder in ("dsa_hal", "ops", "model", "autotune"):
        for path in (root / folder).rglob("*.py"):
            if any(parent.is_symlink() for parent in path.parents) or path.name in allowed:
                continue
            text = path.read_text()
            assert "version.hip" not in text and "waves_per_eu" not in text, path
