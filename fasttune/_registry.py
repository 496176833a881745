"""Ops and their backends: which backend runs a call, and why the others do not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fasttune import _torch

LIBRARY = torch.library.Library("fasttune", "DEF")
OPS: dict[str, Op] = {}

BACKENDS = ("reference", "cpu", "triton", "cuda")
# First that supports the arguments wins. Triton covers every op; CUDA C++ needs an R580+ driver.
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}

# A small layer of a patched model asks for these two by themselves, to save the call
# (patching/swap.py): forced_backend() is what they mean.
forced_in_context: ContextVar[str | None] = ContextVar("fasttune_backend", default=None)
forced_by_environment = os.environ.get("FASTTUNE_BACKEND")


class BackendError(RuntimeError):
    """A backend was asked for that cannot take these arguments."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    ``supports(*args)`` returns why the backend cannot take these arguments, or None if it can.
    """

    name: str
    run: Callable[..., Any]
    supports: Callable[..., str | None]


@dataclass
class Op:
    """A schema with a fake (meta) kernel and one implementation per backend."""

    name: str
    schema: str
    backends: dict[str, Backend] = field(default_factory=dict)

    def backend(
        self, name: str, supports: Callable[..., str | None]
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: register the implementation of backend ``name``."""

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            self.backends[name] = Backend(name, _outside_autocast(run), supports)
            return run

        return register

    def select(self, *args: Any) -> Backend:
        """The backend for these arguments.

        Raises:
            BackendError: a forced backend does not exist for this op or cannot take the arguments.
        """
        name = forced_backend()
        if name is not None:
            chosen = self.backends.get(name)
            reason = "it is not implemented" if chosen is None else chosen.supports(*args)
            if chosen is None or reason is not None:
                raise BackendError(f"{self.name}: backend {name!r} was asked for, but {reason}")
            return chosen
        for name in ORDER.get(_device_type(args), ("reference",)):
            candidate = self.backends.get(name)
            if candidate is not None and candidate.supports(*args) is None:
                return candidate
        raise BackendError(f"{self.name}: no backend takes these arguments")

    def reasons(self, *args: Any) -> dict[str, str | None]:
        """For every backend: why it cannot take these arguments, or None."""
        missing = "it is not implemented"
        return {
            name: self.backends[name].supports(*args) if name in self.backends else missing
            for name in BACKENDS
        }

    @property
    def registered(self) -> Any:
        """The op as torch sees it: ``torch.ops.fasttune.<name>.default``."""
        return getattr(torch.ops.fasttune, self.name).default


def _outside_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """Implementations choose every dtype themselves: autocast must not cast inside them."""

    def wrapped(*args: Any) -> Any:
        if not _torch.any_autocast():
            return run(*args)
        device_type = _device_type(args)
        if _torch.autocast_dtype(device_type) is None:
            return run(*args)
        with torch.autocast(device_type, enabled=False):
            return run(*args)

    return wrapped


def define(name: str, schema: str, fake: Callable[..., Any]) -> Op:
    """Define op ``name`` with torch and with this registry.

    ``schema`` is the argument and return part of a torch schema; ``fake`` computes empty outputs.
    """
    op = Op(name, schema)
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args: Any) -> Any:
        return op.select(*args).run(*args)

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"fasttune::{name}", fake, lib=LIBRARY)
    OPS[name] = op
    return op


def must_dispatch(tensors: Sequence[Tensor | None]) -> bool:
    """True if a call has to go through torch's dispatcher to be seen or to be traced."""
    return is_traced(tensors) or _torch.profiling()


def is_traced(tensors: Sequence[Tensor | None]) -> bool:
    """True if a call may not be made of real tensors alone."""
    return (
        torch.compiler.is_compiling()
        or _torch.under_dispatch_mode()
        or not _torch.all_plain(tensors)
    )


def read_environment() -> None:
    """Read ``FASTTUNE_BACKEND`` again; importing fasttune and ``fasttune.patch`` do."""
    global forced_by_environment
    forced_by_environment = os.environ.get("FASTTUNE_BACKEND")


def forced_backend() -> str | None:
    """The backend that ``use_backend`` or ``FASTTUNE_BACKEND`` asks for, or None."""
    name = forced_in_context.get() or forced_by_environment or None
    if name is not None:
        _check_name(name, "FASTTUNE_BACKEND")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op called in this context to run on backend ``name``.

    The backward of a call runs on the backend that ran its forward.

    Args:
        name: "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: ``name`` is no backend.
    """
    _check_name(name, "use_backend")
    token = forced_in_context.set(name)
    try:
        yield
    finally:
        forced_in_context.reset(token)


def _check_name(name: str, where: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{where}: expected one of {', '.join(BACKENDS)}, got {name!r}")


def _device_type(args: Sequence[Any]) -> str:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device.type
        if isinstance(arg, (list, tuple)):
            found = _device_type(arg)
            if found:
                return found
    return ""
