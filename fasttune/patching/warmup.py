"""warmup: compile the Triton kernels of a patched model before its first step."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from fasttune import _registry
from fasttune.errors import PatchError
from fasttune.integrations import transformers
from fasttune.integrations import triton as triton_hooks
from fasttune.ops import _triton
from fasttune.patching import state
from fasttune.patching.engine import is_patched
from fasttune.patching.report import render
from fasttune.patching.step import LossFn, preserved, run_loss

_STEPS = 2  # layers that share an input are known after the first: groups.py


@dataclass(frozen=True)
class WarmUp:
    """What :func:`warmup` did; ``str()`` is a table.

    Attributes:
        compiled: names of the kernels compiled in this process, one an argument type and shape
            class that Triton tells apart.
        loaded: those found in Triton's cache directory, from an earlier run or another process.
        seconds: time of it all.
        waited_s: of that, waiting for other processes to compile.
        reason: why nothing was to be compiled; empty if the steps were run.
    """

    compiled: tuple[str, ...] = ()
    loaded: tuple[str, ...] = ()
    seconds: float = 0.0
    waited_s: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"fasttune warmup: nothing to compile: {self.reason}\n"
        title = f"fasttune warmup: {self.seconds:.1f} s, {self.waited_s:.1f} s of it waiting"
        table = Table("kernel", "compiled", "loaded", title=title)
        counts = Counter(self.compiled), Counter(self.loaded)
        for name in sorted({*self.compiled, *self.loaded}):
            table.add_row(name, *(str(count[name]) for count in counts))
        return render(table)


def warmup(
    model: nn.Module,
    batch: Any = None,
    *,
    loss_fn: LossFn | None = None,
    timeout_s: float = 600.0,
    progress: bool = True,
) -> WarmUp:
    """Compile, or load from Triton's cache directory, every Triton kernel that a training step of a
    patched model launches, by running two steps without an optimizer.

    Random state, ``.grad``, buffers, train / eval mode and the records of :func:`fasttune.report`
    are as before afterwards; no parameter changes. Autocast and gradient checkpointing are those in
    force: call it as the training loop calls the model.

    Of several processes each calls it, wrapped (DDP, FSDP) or not. One compiles a kernel, the
    others that share its cache directory load it: the directory is locked for each kernel. Ranks
    of a wrapped model have to call it together, as they step together.

    On a CPU, or without Triton, there is nothing to compile: nothing is run, and ``reason`` says
    so.

    Args:
        model: a patched model.
        batch: a mapping of the model's arguments with labels, or anything that ``loss_fn`` takes,
            of the size used in training: the number of rows decides about a few kernels. None takes
            two sequences of up to 512 tokens, for models of transformers with a language head.
        loss_fn: ``loss_fn(model, batch)`` returns a 0-d loss; None takes ``model(**batch).loss``.
        timeout_s: seconds to wait for another process that compiles; then this one warns and
            compiles for itself.
        progress: show a progress bar on a terminal, on rank 0.

    Raises:
        PatchError: the model is not patched, or parameters are updated inside backward.
        ValueError: ``timeout_s`` is negative; the model returns no loss; or batch is None for a
            model that no stand-in batch is known for.
    """
    if not is_patched(model):
        raise PatchError("warmup: the model is not patched; call fasttune.patch first")
    if timeout_s < 0:
        raise ValueError(f"timeout_s: expected at least 0, got {timeout_s}")
    reason = _why_nothing(model)
    if reason is not None:
        return WarmUp(reason=reason)
    batch = _stand_in(model, loss_fn) if batch is None else batch
    compiled: list[str] = []
    loaded: list[str] = []
    start = time.perf_counter()
    with _progress_bar(progress) as bar:
        task = bar.add_task("Triton kernels", total=2 * _STEPS)

        def note(name: str, cached: bool) -> None:
            (loaded if cached else compiled).append(name)
            bar.update(task, description=f"{len(compiled) + len(loaded)} Triton kernels: {name}")

        with (
            preserved(model),
            triton_hooks.one_compilation_at_a_time(note, timeout_s) as lock,
        ):
            model.train()
            for _ in range(_STEPS):
                loss = run_loss(model, batch, loss_fn)
                bar.advance(task)
                loss.backward()
                bar.advance(task)
                for parameter in model.parameters():
                    parameter.grad = None
            if loss.is_cuda:
                torch.cuda.synchronize(loss.device)
    if lock.timed_out:
        state.logger.warning(
            "warmup: another process held %s for more than %g s; this one went on without it",
            lock.path,
            timeout_s,
        )
    seconds = time.perf_counter() - start
    return WarmUp(tuple(compiled), tuple(loaded), seconds, lock.waited_s)


def _why_nothing(model: nn.Module) -> str | None:
    forced = _registry.forced_backend()
    if forced not in (None, "triton"):
        return f"the backend {forced} is forced"
    parameters = list(model.parameters())
    on_gpu = [parameter for parameter in parameters if parameter.is_cuda]
    missing = _triton.why_not(on_gpu or parameters)
    return None if missing is None else f"no Triton kernel runs here: {missing}"


def _stand_in(model: nn.Module, loss_fn: LossFn | None) -> Any:
    batch = transformers.stand_in_batch(model) if loss_fn is None else None
    if batch is None:
        raise ValueError(
            f"batch: expected one of the training batches: no stand-in is known for "
            f"{type(model).__name__}{' with a loss_fn' if loss_fn is not None else ''}"
        )
    return batch


def _progress_bar(shown: bool) -> Progress:
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    hidden = not (shown and console.is_terminal and state.on_first_rank())
    return Progress(*columns, console=console, transient=True, disable=hidden)
