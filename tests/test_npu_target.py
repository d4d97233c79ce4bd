"""Ascend as a target: names of devices, what is known without one, and what a machine whose
torch_npu or CANN lacks functions says of itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_process import Server, environment
from npu_machine import package

from dsa_hal.backends import npu
from dsa_hal.backends.npu import _probe
from dsa_hal.backends.npu._constraints import table
from dsa_hal.backends.npu._library import refusal
from dsa_hal.backends.portable.library import imported
from dsa_hal.errors import ConfigError
from dsa_hal.ops.layout import KVLayout
from dsa_hal.selection import use
from dsa_hal.target import Target, architectures, named, probe, stand_in

ARCHES = ("a2", "a3", "950")
absent_only = pytest.mark.skipif(isinstance(probe("npu"), Target), reason="an NPU is here")
compiler = shutil.which("cc")
needs_compiler = pytest.mark.skipif(compiler is None, reason="no C compiler to make a library with")


# -- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("Ascend910B1", "a2"), ("Ascend910B2", "a2"), ("Ascend910B2C", "a2"),
        ("Ascend910B4-1", "a2"), ("Ascend910_9391", "a3"), ("Ascend910_9392", "a3"),
        ("Ascend910_9362", "a3"), ("Ascend950PR_9589", "950"), ("Ascend950DT_9582x", "950"),
        ("Ascend950DT_95A1", "950"), ("Ascend910_9589", "950"),
        ("Ascend910B", None), ("Ascend910ProB", None), ("Ascend910A", None), ("Ascend310P3", None),
        ("Ascend310B4", None), ("Ascend950 not support", None), ("Ascend960", None), ("", None),
    ],
)  # fmt: skip
def test_devices_have_their_architecture_or_none(name: str, arch: str | None) -> None:
    assert npu.architecture(name) == arch


def test_what_is_stated_of_every_architecture() -> None:
    stated = architectures("npu")
    assert tuple(stated) == ARCHES
    for arch, limits in stated.items():
        assert npu.architecture(limits.device) == arch and limits.source
        assert limits.page_size == 128 and limits.processors and limits.shared
        assert (limits.fp8 is None) == (arch != "950")
        for layout in limits.caches.values():
            dims = "512+64" if layout.startswith("latent") else "128"
            assert KVLayout.parse(f"{layout}/{dims}").record


@absent_only
@pytest.mark.parametrize("arch", ARCHES)
def test_a_target_without_its_device(arch: str) -> None:
    target = named(f"npu:{arch}")
    assert target.device == "meta" and f"npu:{arch} is not in this machine" in target.absent
    with pytest.raises(ConfigError, match="npu:a2, npu:a3, npu:950"):
        named("npu:910b")


def test_the_versions_of_driver_and_cann(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npu, "DRIVER", tmp_path / "version.info")
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    assert npu.driver() is None
    (tmp_path / "version.info").write_text("Version=25.5.0\nascendhal_version=7.35.23\n")
    assert npu.driver() == "25.5.0"
    toolkit = tmp_path / "aarch64-linux" / "ascend_toolkit_install.info"
    toolkit.parent.mkdir()
    toolkit.write_text("package_name=Ascend-cann-toolkit\nversion=9.1.0\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert npu.driver() == "25.5.0, CANN 9.1.0"


# -- the command line ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dsa() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@absent_only
@pytest.mark.parametrize("arch", ARCHES)
def test_questions_about_an_absent_npu_are_answered(dsa: Server, arch: str) -> None:
    asked = {"DSA_HAL_TARGET": f"npu:{arch}"}
    rows = json.loads(dsa("support", "route", "--format", "json", **asked).out)
    assert {row["target"] for row in rows} == {f"npu:{arch}"}
    served = {row["case"] for row in rows if row["impl"].endswith("/moe_gating_top_k")}
    assert served, "the table of constraints answers for it"
    refused = [row["reason"] for row in rows if row["answer"] == "refused"]
    assert any("npu_moe_gating_top_k: " in reason for reason in refused)
    told = dsa("explain", "route", **asked)
    assert told.code == 0 and f"on npu:{arch}" in told.out and "npu/moe_gating_top_k" in told.out
    assert f"npu:{arch} is not in this machine" in dsa("test", "route", **asked).error


# -- what the libraries have ---------------------------------------------------------------------


def test_a_stand_in_and_an_absent_target_ask_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("asked")

    monkeypatch.setattr(_probe, "missing", asked)
    x = torch.empty(4, 4096, dtype=torch.bfloat16, device="meta")
    targets = [stand_in("npu:a2", "cpu"), stand_in("npu:a2", "meta")]
    for target in (*targets, *([] if isinstance(probe("npu"), Target) else [named("npu:a2")])):
        with use(target=target):
            assert refusal("npu_swiglu", input=x) is None
    here = Target("npu", "a2", "npu")
    with use(target=here), pytest.raises(AssertionError, match="asked"):
        refusal("npu_swiglu", input=x)


def library(folder: Path, name: str, functions: list[str]) -> None:
    """A shared library with these functions."""
    folder.mkdir(parents=True, exist_ok=True)
    source = "".join(f"int {function}(void) {{ return 0; }}\n" for function in functions)
    assert compiler is not None
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / name)]
    subprocess.run(command, input=source, text=True, check=True)


def whole(place: Path, *, without: str = "") -> None:
    """A CANN with every function that is called, but one."""
    functions = [function for entry in table().values() for function in entry.aclnn]
    here = [function for function in functions if function != without]
    library(place / "cann" / "lib64", "libopapi.so", here)


def asked(
    place: Path, *words: str, lacking: str = "", device: str = "Ascend910B2", **more: str
) -> Any:
    """What a machine says whose CANN is in `place` and whose torch_npu lacks one op."""
    package(place, [op for op in table() if op != lacking], device)
    home = place / "cann"
    paths = dict(LD_LIBRARY_PATH=str(home / "lib64"), ASCEND_HOME_PATH=str(home))
    variables = environment(**paths, **more)
    variables["PYTHONPATH"] = os.pathsep.join([str(place), variables["PYTHONPATH"]])
    command = [sys.executable, str(Path(__file__).with_name("npu_machine.py")), *words]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_compiler
@absent_only
def test_a_machine_with_everything(tmp_path: Path) -> None:
    whole(tmp_path)
    (tmp_path / "cann" / "x86_64-linux").mkdir(parents=True)
    info = tmp_path / "cann" / "x86_64-linux" / "ascend_toolkit_install.info"
    info.write_text("package_name=Ascend-cann-toolkit\nversion=9.1.0\n")
    said = asked(tmp_path, "doctor", device="Ascend910_9392")
    assert (said["target"], said["name"]) == ("npu:a3", "Ascend910_9392")
    assert said["missing"] == {} and said["libraries"] == ["libopapi.so"]
    assert said["driver"].endswith("CANN 9.1.0")
    assert [f["state"] for f in said["doctor"] if f["name"] == "npu"] == ["ok"]
    assert said["verdicts"][0][1] == "ok"


@needs_compiler
@absent_only
def test_an_older_cann_and_torch_npu(tmp_path: Path) -> None:
    """Selection falls to the next implementation; doctor says which that is, and for which ops."""
    whole(tmp_path, without="aclnnLightningIndexer")
    said = asked(tmp_path, "doctor", lacking="npu_moe_gating_top_k")
    missing, (first, *_) = said["missing"], said["verdicts"]
    assert set(missing) == {"npu_lightning_indexer", "npu_moe_gating_top_k"}
    assert "this torch_npu has no npu_moe_gating_top_k" in missing["npu_moe_gating_top_k"]
    sentence = missing["npu_lightning_indexer"]
    assert "aclnnLightningIndexer is not in this CANN's libopapi.so" in sentence
    assert "install CANN 9 or newer" in sentence
    assert first == ["npu/lightning_indexer", "shape", sentence]
    served = next(label for label, question, _ in said["verdicts"] if question == "ok")
    assert served != "npu/lightning_indexer"
    found = {f["name"]: f for f in said["doctor"] if f["state"] == "warning"}
    assert set(found) == {f"npu {op}" for op in missing}
    indexer = found["npu npu_lightning_indexer"]["text"]
    assert sentence in indexer and "sparse_mla" not in indexer
    assert f"indexer_topk_paged is served by {served}" in indexer
    assert "route is served by npu/torch" in found["npu npu_moe_gating_top_k"]["text"]


@needs_compiler
@absent_only
def test_functions_in_libraries_beside_it_and_added_ones_are_found(tmp_path: Path) -> None:
    home = tmp_path / "cann" / "lib64"
    library(home, "libopapi_transformer.so", ["aclnnLightningIndexer"])
    added = tmp_path / "added" / "op_api" / "lib"
    library(added, "libcust_opapi.so", ["aclnnMoeGatingTopK"])
    vendor = tmp_path / "opp" / "vendors" / "mine" / "op_api" / "lib"
    library(vendor, "libcust_opapi.so", ["aclnnSwiGlu"])
    library(home, "libopapi.so", ["aclnnRmsNorm"])
    said = asked(
        tmp_path, ASCEND_CUSTOM_OPP_PATH=str(tmp_path / "added"),
        ASCEND_OPP_PATH=str(tmp_path / "opp"),
    )  # fmt: skip
    there = set(table()) - set(said["missing"])
    assert there == {
        "npu_lightning_indexer", "npu_moe_gating_top_k", "npu_swiglu", "npu_rms_norm"
    }  # fmt: skip
    assert len(said["libraries"]) == 4


@absent_only
def test_a_machine_without_cann(tmp_path: Path) -> None:
    said = asked(tmp_path)
    assert said["libraries"] == [] and set(said["missing"]) == set(table())
    assert all("source CANN's set_env.sh" in sentence for sentence in said["missing"].values())


@absent_only
def test_a_device_that_nothing_was_written_for(tmp_path: Path) -> None:
    said = asked(tmp_path, device="Ascend310P3")
    assert "Ascend310P3" in said["target"] and "Ascend910B1 and later (a2)" in said["target"]


@absent_only
def test_a_torch_npu_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a wheel without CANN's libraries."""
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    imported.cache_clear()
    said = npu.target()
    imported.cache_clear()
    assert "torch_npu is installed, but importing it raised ImportError: libhccl" in str(said)
    assert "source CANN's set_env.sh" in str(said)
