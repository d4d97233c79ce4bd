"""`dsa-hal report proof`: the committed page and the README's table are what the results say."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest

from dsa_hal.cli import proof
from dsa_hal.errors import BadInput

ROOT = Path(__file__).parent.parent
COMMAND = "run: dsa-hal report proof --write"


def test_the_committed_page_is_current() -> None:
    assert (ROOT / proof.PAGE).read_text() == proof.page(proof.gather(ROOT)), COMMAND


def test_the_readme_holds_the_table() -> None:
    text = (ROOT / "README.md").read_text()
    assert text == proof.placed(text, proof.summary(proof.gather(ROOT))), COMMAND


def checkout(tmp_path: Path) -> Path:
    """A tree of results, small enough to count by hand."""
    support, compiled = tmp_path / "ci" / "support", tmp_path / "ci" / "cross_compile"
    support.mkdir(parents=True)
    compiled.mkdir()
    (support / "cpu.csv").write_text(
        "target,op,impl,case,answer,default_run,reason\n"
        "cpu:any,topk,cpu/torch,one,served,yes,\n"
        "cpu:any,topk,cpu/torch,huge,served,too large,\n"
        "cpu:any,topk,cpu/torch,odd,refused,yes,no\n"
    )
    (support / "ran-sm90.csv").write_text(
        "target,op,impl,case,status,detail\n"
        "cuda:sm90,topk,cuda/cuda,one,ok,\n"
        "cuda:sm90,topk,cuda/torch,one,ok,\n"
        "cuda:sm90,rope,cuda/triton,one,failed,wrong\n"
        "cuda:sm90,rope,cuda/triton,odd,refused,cannot\n"
    )
    (support / "interpreted-gfx950.csv").write_text(
        "target,op,impl,case,status,detail\nrocm:gfx950,rope,rocm/triton,one,ok,\n"
    )
    (support / "emulated-a2.csv").write_text(
        "target,op,impl,case,status,detail\n"
        "npu:a2,rope,npu/torch_npu,one,ok,\n"
        "npu:a2,rope,npu/torch_npu,two,refused,cannot\n"
    )
    (compiled / "table-3.7.0.csv").write_text(
        "target,op,impl,case,kernel,config\n"
        "rocm:gfx950,rope,rocm/triton,one,rope.rotate,a\n"
        "rocm:gfx950,rope,rocm/triton,one,rope.rotate,b\n"
    )
    (compiled / "table-3.6.0.csv").write_text(
        "target,op,impl,case,kernel,config\nrocm:gfx950,rope,rocm/triton,one,rope.rotate,a\n"
    )
    return tmp_path


def test_results_are_counted(tmp_path: Path) -> None:
    found = proof.gather(checkout(tmp_path))
    assert found.counts["cpu:any", "topk"] == {"ran": 1}
    assert found.counts["cuda:sm90", "topk"] == {"ran": 2}
    assert found.counts["rocm:gfx950", "rope"] == {"interpreted": 1, "compiled": 2}
    assert found.failed == {("cuda:sm90", "rope"): 1} and found.compilers == ["3.6.0", "3.7.0"]
    text = proof.page(found)
    row = (
        "| rope | nothing | **failed 1** | interpreted 1, compiled 2 | nothing | emulated 1 |"
        " nothing | nothing |"
    )
    assert row in text and "by Triton 3.6.0, 3.7.0" in text
    assert "| topk | ran 1 | ran 2 | nothing | nothing | nothing |" in text
    assert "| rope | empty, odd," in text, "cases that were left out"
    told = proof.summary(found)
    assert "| `cuda:sm90` | NVIDIA H200 | 2 cases of 1 ops, 1 failed | no | no | no |" in told
    assert "MI350X | not recorded | 1 cases of 1 ops | no | 2 programs of 1 ops |" in told
    assert "| `npu:a2` | Ascend910B2 | not recorded | no | 1 cases of 1 ops | no |" in told


def test_the_command_writes_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = checkout(tmp_path)
    monkeypatch.setattr(proof.dsa_hal, "__file__", str(root / "dsa_hal" / "__init__.py"))
    (root / "README.md").write_text(f"before\n{proof.BEGIN}old\n{proof.END}after\n")
    assert proof.run(argparse.Namespace(write=False)) == 0
    assert capsys.readouterr().out == proof.page(proof.gather(root))
    assert proof.run(argparse.Namespace(write=True)) == 0
    text = (root / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert (root / proof.PAGE).read_text() == proof.page(proof.gather(root))
    (root / "README.md").write_text("no marks")
    with pytest.raises(BadInput, match="no single place"):
        proof.run(argparse.Namespace(write=True))
    shutil.rmtree(root / "ci" / "support")
    with pytest.raises(BadInput, match="is no checkout"):
        proof.run(argparse.Namespace(write=False))
