"""One suite for every op and backend; adding an op adds cases, not test code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fasttune import _native, _registry
from fasttune._native import _cuda
from fasttune.ops import _triton
from fasttune.testing import cuda_on_host, numerics

Forward = Callable[..., Tensor]

WITHOUT_CUDA = ("reference", "cpu", "triton")
WITH_CUDA = (*WITHOUT_CUDA, "cuda")


@dataclass(frozen=True)
class Call:
    """One call of an op on concrete tensors.

    Attributes:
        leaves: the tensors to differentiate by, in the order that the functions take them.
        fused: the op under test, of the leaves.
        stock: the same in plain torch in the same dtypes, with the same dropout mask.
        truth: the same in plain torch; called with fp64 copies of the leaves.
        autocast: autocast dtype around fused and stock, or None.
        names: of the leaves, for messages.
        output_floor: extra absolute tolerance of the output: a 0-d result is one sample of torch's
            error, which may be small by luck, so that its builder derives a bound.
        gradient_floor: the same of the gradient of the first leaf: where the truth is what
            cancellation leaves, the bound is a rounding of the terms that cancel.
    """

    leaves: Sequence[Tensor]
    fused: Forward
    stock: Forward
    truth: Forward
    autocast: torch.dtype | None = None
    names: Sequence[str] = ()
    output_floor: float = 0.0
    gradient_floor: float = 0.0


@dataclass(frozen=True)
class Case:
    """A named, seeded builder of a call; ``device`` moves it to a GPU.

    Attributes:
        name: test id.
        op: name of the op, without _fwd.
        build: makes the call on a device, from torch's seeded generator.
        backends: those that take it; the others must give a reason.
    """

    name: str
    op: str
    build: Callable[[str], Call]
    backends: Sequence[str] = WITHOUT_CUDA


@contextlib.contextmanager
def backend(name: str, device: str = "cpu") -> Iterator[None]:
    """Force a backend; "cpu:avx2" also picks a build. On the CPU "triton" means the interpreter and
    "cuda" the emulator.
    """
    base, _, isa = name.partition(":")
    with contextlib.ExitStack() as stack:
        if base == "triton" and device == "cpu":
            stack.enter_context(triton_on_cpu())
        if base == "cuda" and device == "cpu":
            stack.enter_context(cuda_on_cpu())
        if isa:
            previous = _native.cpu().isa_name()
            _native.cpu().set_isa(isa)
            stack.callback(_native.cpu().set_isa, previous)
        stack.enter_context(_registry.use_backend(base))
        yield


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[None]:
    """The Triton tier takes CPU tensors and runs in the interpreter."""
    from fasttune.testing.triton_interpreter import interpreted

    previous, _triton.accepts_cpu_tensors = _triton.accepts_cpu_tensors, True
    try:
        with interpreted():
            yield
    finally:
        _triton.accepts_cpu_tensors = previous


@contextlib.contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """The CUDA tier takes CPU tensors and runs on the emulator, behind the module's own binding."""
    previous, _cuda.emulator = _cuda.emulator, _emulated().launch
    try:
        yield
    finally:
        _cuda.emulator = previous


@lru_cache(maxsize=1)
def _emulated() -> cuda_on_host.Extension:
    return cuda_on_host.Extension(Path(__file__).parents[2] / "csrc")


def run_case(case: Case, backend_name: str, device: str = "cpu") -> int:
    """Forward and gradients against truth and torch; inputs unmutated, outputs fully written.

    Returns:
        How many tensors were compared.

    Raises:
        AssertionError: one of them is wrong; names it.
    """
    torch.manual_seed(0)
    call = case.build(device)
    before = [leaf.detach().clone() for leaf in call.leaves]
    truth_leaves = [
        leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in call.leaves
    ]
    truth, dy = _differentiate(call.truth, truth_leaves, None)
    with _autocast(device, call.autocast):
        stock, _ = _differentiate(call.stock, call.leaves, dy)
    _native.free_scratch()
    with (
        backend(backend_name, device),
        numerics.poisoned_memory(),
        _autocast(device, call.autocast),
    ):
        fused, _ = _differentiate(call.fused, call.leaves, dy)
    trained = [i for i, leaf in enumerate(call.leaves) if leaf.requires_grad]
    names = ["output", *(f"gradient of {_name(call, i)}" for i in trained)]
    floors = {0: call.output_floor}
    if trained and trained[0] == 0:
        floors[1] = call.gradient_floor
    for i, (name, ours, theirs, exact) in enumerate(zip(names, fused, stock, truth, strict=True)):
        assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype}, torch gives {theirs.dtype}"
        numerics.check(name, ours, theirs, exact, floors.get(i, 0.0))
    for i, (leaf, old) in enumerate(zip(call.leaves, before, strict=True)):
        assert torch.equal(leaf, old), f"{_name(call, i)} was changed"
    return len(names)


def _name(call: Call, index: int) -> str:
    return call.names[index] if index < len(call.names) else f"leaf {index}"


def _differentiate(
    function: Forward, leaves: Sequence[Tensor], dy: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    y = function(*leaves)
    if dy is None:
        generator = torch.Generator(y.device).manual_seed(1)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float32, device=y.device)
        # Exact in every dtype, so that all three see the same incoming gradient.
        dy = dy.to(torch.bfloat16).double()
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    with torch.autocast(y.device.type, enabled=False):
        gradients = torch.autograd.grad(y, wanted, dy.to(y.dtype)) if wanted else ()
    return [y.detach(), *gradients], dy


@contextlib.contextmanager
def _autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    kind = torch.device(device).type
    with torch.autocast(kind, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        yield
