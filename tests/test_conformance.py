"""Every op x backend x case: forward and gradients against fp64 truth and torch's own error."""

import pytest
import torch

from fasttune import BackendError, _native
from fasttune.ops import _gemm
from fasttune.testing import cuda_on_host
from fasttune.testing.cases import ALL
from fasttune.testing.conformance import Case, backend, run_case

BUILDS = [f"cpu:{isa}" for isa in _native.cpu().isa_available().split(",")]
IN_CUDA = ("glu", "rms_norm", "lora_linear", "bias_activation", "bottleneck")
# The interpreter runs program by program in Python: these cases would take minutes there.
TOO_SLOW_INTERPRETED = {"linear_cross_entropy-several-chunks", "linear_cross_entropy-wide"}


def ids(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", ALL, ids=ids)
def test_reference_matches_truth(case: Case) -> None:
    assert run_case(case, "reference") >= 1


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("case", [case for case in ALL if "cpu" in case.backends], ids=ids)
def test_cpu_matches_truth(case: Case, build: str) -> None:
    assert run_case(case, build) >= 1


@pytest.mark.parametrize("case", [case for case in ALL if "cpu" in case.backends], ids=ids)
def test_cpu_matches_truth_with_the_other_kind_of_products(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This CPU's 16-bit products run in one way, another CPU's in the other: both are right."""
    native = _gemm.through_fp32(torch.device("cpu"), torch.bfloat16)

    def other(device: torch.device, dtype: torch.dtype) -> bool:
        return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not native

    monkeypatch.setattr(_gemm, "through_fp32", other)
    assert run_case(case, "cpu") >= 1


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=[pytest.mark.slow] if c.name in TOO_SLOW_INTERPRETED else [])
        for c in ALL
        if "triton" in c.backends
    ],
    ids=ids,
)
def test_triton_interpreter_matches_truth(case: Case) -> None:
    assert run_case(case, "triton") >= 1


@pytest.mark.skipif(cuda_on_host.compiler_missing() is not None, reason="the emulator needs g++")
@pytest.mark.parametrize("case", [case for case in ALL if "cuda" in case.backends], ids=ids)
def test_cuda_on_the_emulator_matches_truth(case: Case) -> None:
    assert run_case(case, "cuda") >= 1


@pytest.mark.skipif(cuda_on_host.compiler_missing() is not None, reason="the emulator needs g++")
@pytest.mark.parametrize(
    "case",
    [case for case in ALL if case.op in IN_CUDA and "cuda" not in case.backends],
    ids=ids,
)
def test_cuda_gives_a_reason_for_what_it_does_not_take(case: Case) -> None:
    call = case.build("cpu")
    with (
        backend("cuda"),
        torch.autocast("cpu", call.autocast, enabled=call.autocast is not None),
        pytest.raises(BackendError, match=r"it takes .* got|it takes gate and up of one dtype"),
    ):
        call.fused(*call.leaves)


@pytest.mark.gpu
@pytest.mark.skipif(_native.cuda_missing() is not None, reason=str(_native.cuda_missing()))
@pytest.mark.parametrize("case", [case for case in ALL if "cuda" in case.backends], ids=ids)
def test_cuda_on_a_gpu_matches_truth(case: Case) -> None:
    assert run_case(case, "cuda", device="cuda") >= 1


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in ALL if "triton" in case.backends], ids=ids)
def test_gpu_matches_truth(case: Case) -> None:
    assert run_case(case, "triton", device="cuda") >= 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [c for c in ALL if c.op.startswith(("lora", "dora")) and "triton" in c.backends]
    + [c for c in ALL if not c.op.startswith(("lora", "dora")) and "triton" in c.backends][::3],
    ids=ids,
)
def test_gpu_matches_truth_when_launches_are_repeated(case: Case) -> None:
    for _ in range(3):  # run, written down, repeated: tests/triton/test_repeat.py
        assert run_case(case, "triton", device="cuda") >= 1


@pytest.mark.parametrize("name", ["cpu", "triton"])
@pytest.mark.parametrize("case", [c for c in ALL if c.backends == ("reference",)], ids=ids)
def test_unsupported_arguments_give_a_reason(case: Case, name: str) -> None:
    call = case.build("cpu")
    with backend(name), pytest.raises(BackendError, match=r"float64|not implemented"):
        call.fused(*call.leaves)


@pytest.mark.parametrize(
    "fast", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["projected", "whole"]
)
@pytest.mark.parametrize("case", [c for c in ALL if "fp64" in c.name], ids=ids)
def test_reference_gradients_match_finite_differences(case: Case, fast: bool) -> None:
    """The Jacobian along random directions, or all of it."""
    call = case.build("cpu")
    leaves = tuple(call.leaves)
    assert torch.autograd.gradcheck(call.fused, leaves, eps=1e-6, atol=1e-5, fast_mode=fast)


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in ALL
        if c.name.endswith(("dropout", "biases", "two-adapters", "everything", "fp32"))
    ],
    ids=ids,
)
def test_compiles_without_graph_breaks_to_the_same_numbers(case: Case) -> None:
    call = case.build("cpu")
    torch._dynamo.reset()
    compiled = torch.compile(call.fused, backend="aot_eager", fullgraph=True)
    wanted = [leaf for leaf in call.leaves if leaf.requires_grad]
    eager, traced = call.fused(*call.leaves), compiled(*call.leaves)
    assert torch.equal(eager, traced)
    expected = torch.autograd.grad(eager, wanted, torch.ones_like(eager))
    for ours, theirs in zip(
        torch.autograd.grad(traced, wanted, torch.ones_like(traced)), expected, strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_wrong_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite can fail: a kernel that is off by one part in a thousand does not pass."""
    original = _native.lora_down
    monkeypatch.setattr(_native, "lora_down", lambda *a, **k: original(*a, **k) * 1.001)
    case = next(case for case in ALL if case.name == "lora_linear-fp32")
    with pytest.raises(AssertionError, match="error"):
        run_case(case, "cpu")
