"""Products, experts, routing and quantisation of the npu backend, run on emulated ops: what the
matrix does not show."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ci.ascend.emulated import emulated
from dsa_hal.backends.npu import _grouped, _rows, linear, moe_experts
from dsa_hal.backends.npu._fp8 import narrow, widen
from dsa_hal.case import Case, Maker
from dsa_hal.check import calc_diff
from dsa_hal.matrix import cost_of
from dsa_hal.ops import moe, packed
from dsa_hal.ops.gemm import grouped_gemm
from dsa_hal.ops.norm import add_rms_norm, rms_norm, silu_mul
from dsa_hal.ops.packed import make_packed, pack_weight
from dsa_hal.ops.quant import dequantize_fp8, quantize_fp8
from dsa_hal.ops.routing import route
from dsa_hal.registry import Op
from dsa_hal.selection import selection

ARCHES = ("a2", "a3", "950")

POLICIES = {"a2": ("bf16", "w8a8"), "a3": ("bf16", "w8a8"), "950": ("fp8", "bf16", "w8a8")}
"""Packings by architecture, the default first."""

LOSSES = {"linear": 3e-3, "grouped_linear": 5e-4, "moe_experts": 1.5e-3}
"""calc_diff of W8A8 against the reference, which rounds activations to FP8. Those of `linear` have
channels twenty times as large as the others, which a scale per token does not suit."""

PACKED = {"linear": ("weight",), "grouped_linear": ("weight",), "moe_experts": ("w13", "w2")}


# -- e4m3 without a device that knows it --------------------------------------------------------


def _codes() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def test_every_code_means_what_torch_says() -> None:
    got, want = widen(_codes()), _codes().float()
    assert got.dtype == torch.float32
    assert torch.equal(got.isnan(), want.isnan()) and int(want.isnan().sum()) == 2
    same = ~want.isnan()
    assert torch.equal(got[same].view(torch.int32), want[same].view(torch.int32))


def test_rounding_to_e4m3_is_torchs() -> None:
    """All codes, all halves between neighbours and their fp32 neighbours, both signs, and NaN."""
    codes = _codes()[:127].float()
    halves = (codes[1:] + codes[:-1]) / 2
    x = torch.cat([codes, halves, halves.nextafter(codes[1:]), halves.nextafter(codes[:-1])])
    x = torch.cat([x, torch.rand(4096) * 448, torch.rand(4096) * 2**-6, torch.tensor([2.0**-30])])
    x = torch.cat([x, -x])
    got, want = narrow(x), x.to(torch.float8_e4m3fn)
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    assert narrow(torch.tensor([torch.nan, -torch.nan])).float().isnan().all()


# -- packing ------------------------------------------------------------------------------------


@pytest.fixture(params=ARCHES)
def arch(request: pytest.FixtureRequest) -> Iterator[str]:
    with emulated(request.param, checked=True):
        yield request.param


def test_the_default_policy_and_the_others(arch: str) -> None:
    candidates, _ = selection().candidates(pack_weight)
    assert tuple(i.name for i in candidates if i.backend == "npu") == POLICIES[arch]
    weight = make_packed(Maker("cpu", 0), "fp8", 256, 384)
    assert pack_weight.select(*weight).name == POLICIES[arch][0]


def _asked(wish: str, target: str) -> str:
    """Which pack_weight a process of its own chooses."""
    program = """
import torch
from dsa_hal.ops.packed import pack_weight
weight = torch.empty(256, 256, dtype=torch.float8_e4m3fn, device="meta")
print(pack_weight.select(weight, torch.empty(2, 2, device="meta")).label)
"""
    environment = {**os.environ, "DSA_HAL_TARGET": target, "DSA_HAL_IMPL": wish}
    environment.pop("DSA_HAL_BACKEND", None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    return done.stdout.strip() or done.stderr


def test_the_environment_chooses_the_policy() -> None:
    assert _asked("pack_weight=w8a8", "npu:a2") == "npu/w8a8"
    refused = _asked("pack_weight=fp8", "npu:a2")
    assert "Unsupported" in refused and "made for 950, this is a2" in refused


def test_a_weight_without_scales_is_not_copied(arch: str) -> None:
    weight = torch.randn(8, 16, dtype=torch.bfloat16)
    for policy in POLICIES[arch]:
        with emulated(arch, pack_weight=policy):
            (packed_weight,) = pack_weight(weight)
        assert packed_weight is weight


def _w8a8(weight: list[Tensor]) -> list[Tensor]:
    with emulated("a2", pack_weight="w8a8"):
        return pack_weight(*weight)


@pytest.mark.parametrize("shape", [(200, 300), (3, 200, 300)])
def test_int8_codes_and_scales(shape: tuple[int, ...]) -> None:
    """A row's largest element is +-127, and its scale is bf16 before codes are made with it."""
    weight = make_packed(Maker("cpu", 0), "fp8", *shape)
    weight[0].view(torch.uint8)[..., 5, :] = 0  # a row of zeros
    codes, scale = _w8a8(weight)
    *stack, n, k = shape
    assert codes.shape == (*stack, k, n) and codes.dtype == torch.int8 and codes.is_contiguous()
    assert scale.shape == (*stack, n) and scale.dtype == torch.bfloat16
    assert not codes[..., 5].any() and not scale[..., 5].any()
    some = scale > 0
    assert (codes.abs().amax(-2)[some] == 127).all() and int(codes.min()) == -127
    meant = dequantize_fp8.reference(*weight, block_rows=128, out_dtype=torch.float32)
    step = scale.float()[..., None]
    assert ((codes.mT * step - meant).abs() <= 0.5001 * step + 1e-2 * step).all()


DAMAGES = {
    "scales of other outputs": lambda codes, scale: [codes, scale.roll(1, -1)],
    "a twentieth too large": lambda codes, scale: [codes, (scale * 1.06).to(scale.dtype)],
    "another order of inputs": lambda codes, scale: [codes.roll(1, -2), scale],
    "outputs as inputs": lambda codes, scale: [codes.mT.contiguous(), scale],
    "half the bits": lambda codes, scale: [(codes.float() / 16).round().mul(16).clamp(
        -127, 127).to(torch.int8), scale],
    "one output missing": lambda codes, scale: [
        codes.index_fill(-1, torch.tensor([7]), 0), scale],
}  # fmt: skip


@pytest.mark.parametrize("case", [c for c in pack_weight.cases if "fp8" in c.name], ids=str)
@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_packing_is_rejected(damage: str, case: Case) -> None:
    """The product of a packing tells; as many rows and columns as a case has make one output weigh
    enough."""
    inputs = case.make(pack_weight.inputs)
    want = pack_weight.reference(**inputs)
    got = _w8a8([inputs["weight"], inputs["scale"]])
    with emulated("a2", pack_weight="w8a8"):
        assert (report := pack_weight.check(got, want, inputs)).ok, str(report)
        try:
            broken = pack_weight.check(DAMAGES[damage](*got), want, inputs)
        except RuntimeError:
            return  # shapes that do not even multiply
        assert not broken.ok


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation makes, but for `spared` ones."""

    def __init__(self, *spared: torch.dtype) -> None:
        super().__init__()
        self.bytes, self._spared = 0, spared

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype not in self._spared:
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


@pytest.mark.parametrize("policy", ["bf16", "w8a8"])
def test_packing_makes_no_second_large_copy(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 MiB of FP8, 8 in fp32, no temporary exceeds the room; only the result is large."""
    monkeypatch.setattr(_rows, "ROOM", 1 << 20)
    made = torch.randint(0, 120, (2, 1024, 1024), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.rand(2, 8, 8)
    result = {"bf16": torch.bfloat16, "w8a8": torch.int8}[policy]
    with (
        emulated("a2", pack_weight=policy),
        Largest(result, torch.float8_e4m3fn, torch.uint8) as largest,
    ):
        pack_weight(made, scale)
    assert 0 < largest.bytes <= 1 << 20


def _rows_of_packed() -> list[Any]:
    ops: tuple[Op[..., Any], ...] = (packed.linear, packed.grouped_linear, moe.moe_experts)
    return [
        pytest.param(op, case, id=f"{op.name}-{case.name}")
        for op in ops
        for case in op.cases
        if cost_of(op, case).bytes < 5e5
    ]


@pytest.mark.parametrize(("op", "case"), _rows_of_packed())
def test_packed_means_what_the_checkpoint_says(op: Op[..., Any], case: Case) -> None:
    """Each policy, through the implementation that takes its form."""
    inputs = case.make(op.inputs)
    want = op.reference(**inputs)
    for arch, policy in ((a, policy) for a in ("a2", "950") for policy in POLICIES[a]):
        with emulated(arch, pack_weight=policy, checked=True):
            forms = {name: pack_weight(*inputs[name]) for name in PACKED[op.name]}
            given = {**inputs, **forms}
            chosen = op.select(**given)
            got = op(**given)
        quantised = len(next(iter(forms.values()))) == 2
        asked = policy == "w8a8" or case.axes["act"] != "none"
        if quantised and asked and op.name != "moe_experts":
            assert "quant" in chosen.name
        if policy == "w8a8" and quantised:
            findings = calc_diff(LOSSES[op.name])("out", got, want)
            assert got.dtype == want.dtype and all(f.ok for f in findings), str(findings)
        else:
            report = op.check((got,), (want,), inputs)
            assert report.ok, f"{arch}, {policy}: {report}"


@pytest.mark.parametrize(("arch", "policy"), [(a, p) for a in ARCHES for p in POLICIES[a]])
def test_zeros_stay_zeros(arch: str, policy: str) -> None:
    """The scale of nothing is 0, and 0 / 0 no number."""
    make = Maker("cpu", 0)
    x, weight = make.randn(4, 300, dtype=torch.bfloat16), make_packed(make, "fp8", 256, 300)
    x[1], x[2, 128:] = 0, 0
    want = packed.linear.reference(x, weight, act="fp8")
    layout = torch.zeros(4, dtype=torch.int32)
    with emulated(arch, pack_weight=policy, checked=True):
        one = packed.linear(x, pack_weight(*weight), act="fp8")
        stack = pack_weight(weight[0][None], weight[1][None])
        grouped = packed.grouped_linear(x, stack, layout, act="fp8")
    for got in (one, grouped):
        assert not got[1].any() and all(f.ok for f in calc_diff(1e-3)("out", got, want))


def test_what_no_product_would_take_is_not_packed() -> None:
    long = torch.empty(128, 65664, dtype=torch.float8_e4m3fn, device="meta")
    scale = torch.empty(1, 513, device="meta")
    with emulated("a2"):
        found = {v.impl.name: v for v in selection().verdicts(pack_weight, (long, scale), {})}
    assert found["bf16"].question == "ok"
    assert found["w8a8"].question == "shape" and "65535" in found["w8a8"].reason


# -- experts ------------------------------------------------------------------------------------


def _experts(tokens: int, experts: int, topk: int, *, kind: str = "bfloat16") -> dict[str, Any]:
    make = Maker("cpu", 3)
    return dict(
        x=make.randn(tokens, 256, dtype=torch.bfloat16),
        ids=moe.make_ids(make, tokens, topk, experts, 0.0),
        weights=make.randn(tokens, topk).abs(),
        w13=make_packed(make, kind, experts, 256, 256),
        w2=make_packed(make, kind, experts, 256, 128),
        shared=make.randn(tokens, 256, dtype=torch.bfloat16),
        act="none" if kind == "bfloat16" else "fp8",
    )


def _compared(inputs: dict[str, Any], arch: str, policy: str) -> None:
    want = moe.moe_experts.reference(**inputs)
    with emulated(arch, pack_weight=policy, checked=True):
        given = {**inputs, **{name: pack_weight(*inputs[name]) for name in ("w13", "w2")}}
        assert moe.moe_experts.select(**given).name == "grouped_matmul"
        got = moe.moe_experts(**given)
    findings = calc_diff(LOSSES["moe_experts"] if policy == "w8a8" else 2e-3)("out", got, want)
    assert all(f.ok for f in findings), str(findings)


@pytest.mark.parametrize(("arch", "policy"), [(a, p) for a in ARCHES for p in POLICIES[a]])
class TestExperts:
    def test_one_that_gets_every_token(self, arch: str, policy: str) -> None:
        inputs = _experts(9, 5, 1, kind="fp8")
        inputs["ids"].fill_(3)
        _compared(inputs, arch, policy)

    def test_one_expert_alone(self, arch: str, policy: str) -> None:
        """A list of counts must not be one long."""
        _compared(_experts(9, 1, 1, kind="fp8"), arch, policy)

    def test_none_that_is_here(self, arch: str, policy: str) -> None:
        """Nothing was written then, and nothing of that may be in the result."""
        inputs = _experts(9, 5, 2, kind="fp8")
        inputs["ids"].fill_(-1)
        _compared(inputs, arch, policy)

    def test_some_tokens_without_any(self, arch: str, policy: str) -> None:
        inputs = _experts(9, 5, 2, kind="fp8")
        inputs["ids"][::2] = -1
        inputs["x"][::2] = torch.nan
        inputs["weights"][::2] = torch.nan
        _compared(inputs, arch, policy)


class Calls:
    """What a module called, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, dict[str, Any]]] = []
        for module in (_grouped, moe_experts):
            monkeypatch.setattr(module, "call", self._meta)
        monkeypatch.setattr("dsa_hal.backends.npu._products.call", self._meta)

    def _meta(self, name: str, **arguments: Any) -> Any:
        """Results without data, of the shapes that are documented."""
        self.made.append((name, arguments))

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        if name == "npu_moe_init_routing_v2":
            x, slots = arguments["x"], arguments["expert_idx"].numel()
            dtype = torch.int8 if arguments["quant_mode"] == 1 else x.dtype
            return (
                empty(slots, x.shape[1], dtype=dtype),
                empty(slots, dtype=torch.int32),
                empty(arguments["active_expert_range"][1], dtype=torch.int64),
                empty(slots),
            )
        if name == "npu_grouped_matmul":
            rows, weight = arguments["x"][0], arguments["weight"][0]
            dtype = arguments.get("output_dtype", rows.dtype)
            return [empty(rows.shape[0], weight.shape[2], dtype=dtype)]
        if name == "npu_swiglu":
            both = arguments["input"]
            return empty(both.shape[0], both.shape[1] // 2, dtype=both.dtype)
        if name == "npu_dynamic_quant":
            x = arguments["input"]
            return empty(*x.shape, dtype=torch.int8), empty(x.shape[0])
        assert name == "npu_moe_finalize_routing"
        rows, scales = arguments["expanded_permuted_rows"], arguments["scales"]
        return empty(scales.shape[0], rows.shape[1], dtype=rows.dtype)


@pytest.mark.parametrize("policy", ["bf16", "w8a8"])
def test_no_count_comes_to_the_host(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without data whoever asks for a number raises; and each step is called once."""
    inputs = _experts(9, 5, 2, kind="fp8")
    with emulated("a2", pack_weight=policy):
        given = {**inputs, **{name: pack_weight(*inputs[name]) for name in ("w13", "w2")}}
        on_meta: dict[str, Any] = {
            name: [t.to("meta") for t in value] if isinstance(value, list) else value
            for name, value in given.items()
        }
        for name in ("x", "ids", "weights", "shared"):
            on_meta[name] = given[name].to("meta")
        calls = Calls(monkeypatch)
        out = moe_experts.experts(**on_meta)
    assert out.shape == inputs["x"].shape
    between = ["npu_dynamic_quant"] if policy == "w8a8" else []
    assert [name for name, _ in calls.made] == [
        "npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_swiglu", *between,
        "npu_grouped_matmul", "npu_moe_finalize_routing",
    ]  # fmt: skip
    assert calls.made[0][1]["quant_mode"] == (1 if policy == "w8a8" else -1)


# -- refusals, and what serves instead ----------------------------------------------------------


def test_an_older_installation_has_torch_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CANN lacks the kernels, plain torch on the device is next, not an error."""
    for module in ("rms_norm", "add_rms_norm", "silu_mul", "route", "_grouped", "linear"):
        monkeypatch.setattr(
            f"dsa_hal.backends.npu.{module}.refusal", lambda name, **_: f"CANN has no {name}"
        )
    x, w = torch.randn(3, 64, dtype=torch.bfloat16), torch.randn(64)
    a, b = torch.randn(4, 8), torch.randn(2, 8, 8)
    layout = torch.zeros(4, dtype=torch.int32)
    with emulated("a2"):
        assert rms_norm.select(x, w).name == "torch"
        assert add_rms_norm.select(x, x, w).name == "torch"
        assert silu_mul.select(x).name == "torch"
        assert route.select(torch.randn(3, 16), None, topk=2).name == "torch"
        assert grouped_gemm.select(a, b, layout).name == "torch"
        assert packed.linear.select(x, [w[None].bfloat16()]).name == "matmul"


def test_sigmoids_without_a_sum_are_refused_in_a_sentence() -> None:
    with emulated("a2"):
        verdicts = selection().verdicts(route, (torch.randn(3, 16),), dict(topk=2, normalize=False))
    assert "divides the weights of sigmoids" in verdicts[0].reason
    assert verdicts[1].question == "ok"


def test_fp8_values_are_only_multiplied_on_the_950() -> None:
    weight = make_packed(Maker("cpu", 0), "fp8", 256, 256)
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    chosen = {}
    for name in ARCHES:
        with emulated(name):
            chosen[name] = packed.linear.select(x, weight, act="fp8").name
    assert chosen == {"a2": "matmul", "a3": "matmul", "950": "quant_matmul"}


def test_nothing_to_multiply_calls_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels take no empty tensors."""
    weight = make_packed(Maker("cpu", 0), "fp8", 256, 384)
    with emulated("a2", pack_weight="w8a8"):
        form = pack_weight(*weight)
        monkeypatch.setattr(linear, "call", None)
        out = packed.linear(torch.empty(0, 384, dtype=torch.bfloat16), form, act="fp8")
    assert out.shape == (0, 256) and out.dtype == torch.bfloat16


def test_quantising_what_has_no_rows() -> None:
    with emulated("a2"):
        for shape, block_rows in (((0, 256), 1), ((3, 0, 200), 128), ((256, 0), 1)):
            x = torch.empty(shape, dtype=torch.bfloat16)
            got = quantize_fp8(x, block_rows=block_rows)
            want = quantize_fp8.reference(x, block_rows=block_rows)
            assert [t.shape for t in got] == [t.shape for t in want]
