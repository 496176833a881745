"""warmup: on a CPU the kernels are compiled for a GPU that is not there (the dry run)."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

import triton
from tiny_models import gradients, tiny_llama, with_lora

import fasttune
from fasttune import optim
from fasttune.integrations.triton import FileLock, one_compilation_at_a_time
from fasttune.ops import _triton
from fasttune.testing.triton_dry_run import dry_run
from fasttune_kernels import launch

KINDS = ["lora", "norm"]


def build(kinds: Sequence[str] = KINDS) -> Any:
    base = tiny_llama(hidden_size=128, num_hidden_layers=1)
    targets = ["q_proj", "k_proj"]
    model = with_lora(base, target_modules=targets, lora_dropout=0.1).train()
    return fasttune.patch(model, kinds=kinds)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory of Triton."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


@contextlib.contextmanager
def no_gpu(capability: int) -> Iterator[list[Any]]:
    previous, _triton.accepts_cpu_tensors = _triton.accepts_cpu_tensors, True
    try:
        with dry_run(capability) as launches, fasttune.use_backend("triton"):
            forget_compiled_kernels(capability)
            yield launches
    finally:
        _triton.accepts_cpu_tensors = previous


def forget_compiled_kernels(capability: int) -> None:
    """As in a process that has not launched anything; its cache directory stays."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fasttune_kernels."):
            for value in vars(module).values():
                if isinstance(value, triton.JITFunction):
                    value.device_caches.pop(f"dry-run:sm_{capability}", None)
    launch._compiled.clear()


def facts(model: nn.Module) -> list[Any]:
    return [
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: buffer.clone() for name, buffer in model.named_buffers()},
        gradients(model),
        [module.training for module in model.modules()],
        torch.get_rng_state(),
        str(fasttune.explain(model)),
    ]


def assert_equal(after: Any, before: Any) -> None:
    if isinstance(before, Tensor):
        assert torch.equal(after, before)
    elif isinstance(before, dict):
        assert after.keys() == before.keys()
        for key, value in before.items():
            assert_equal(after[key], value)
    else:
        assert after == before


def test_the_first_step_compiles_nothing_and_nothing_else_has_changed(
    cache: Path, batch: dict[str, Tensor]
) -> None:
    model = build()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    model.base_model.model.model.layers[0].mlp.eval()
    before, grads = facts(model), [parameter.grad for parameter in model.parameters()]
    with no_gpu(90) as launches:
        warm = fasttune.warmup(model, batch)
        launched = len(launches)
        for after, expected in zip(facts(model), before, strict=True):
            assert_equal(after, expected)
        assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
        assert fasttune.report(model)["lora"].pending == 2
        assert warm.compiled and not warm.loaded and not warm.reason
        assert "_lora_down_group_kernel" in warm.compiled  # of the second step
        new: list[str] = []
        with one_compilation_at_a_time(lambda name, cached: new.append(name), 1.0):
            model.train()
            for _ in range(2):
                model(**batch).loss.backward()
        assert new == []
        assert len(launches) == 2 * launched
    assert set(warm.compiled) == {launch.kernel for launch in launches}
    assert "_lora_down_group_kernel" in str(warm)


def test_a_second_process_loads_what_the_first_has_compiled(
    cache: Path, batch: dict[str, Tensor]
) -> None:
    with no_gpu(90):
        first = fasttune.warmup(build(), batch)
        assert fasttune.warmup(build(), batch).compiled == ()
        forget_compiled_kernels(90)
        second = fasttune.warmup(build(), batch)
    assert (
        first.compiled
        and second.compiled == ()
        and Counter(second.loaded) == Counter(first.compiled + first.loaded)
    )


def test_a_stand_in_batch_for_language_models(cache: Path, batch: dict[str, Tensor]) -> None:
    with no_gpu(90):
        model = build()
        warm = fasttune.warmup(model)
        assert "_lora_down_group_kernel" in warm.compiled
        new: list[str] = []
        with one_compilation_at_a_time(lambda name, cached: new.append(name), 1.0):
            model(**{name: value.repeat(2, 1) for name, value in batch.items()}).loss.backward()
    # The number of partial sums, a constant of one kernel, follows the number of rows.
    assert set(new) <= {"_sum_group_partials_kernel"}
    plain = fasttune.patch(nn.Sequential(nn.LayerNorm(8), nn.GELU()))
    with no_gpu(90), pytest.raises(ValueError, match="no stand-in is known for Sequential"):
        fasttune.warmup(plain)


@pytest.mark.parametrize("forced", [None, "reference", "cpu"])
def test_where_no_triton_kernel_runs_it_does_nothing_and_says_why(
    forced: str | None, batch: dict[str, Tensor]
) -> None:
    model = build()
    with contextlib.nullcontext() if forced is None else fasttune.use_backend(forced):
        warm = fasttune.warmup(model, batch)
    assert warm.compiled == warm.loaded == ()
    assert warm.reason == (
        "no Triton kernel runs here: it takes CUDA tensors"
        if forced is None
        else f"the backend {forced} is forced"
    )
    assert warm.reason in str(warm)
    assert fasttune.report(model)["lora"].pending == 2


def test_a_step_that_fails_leaves_everything_as_it_was(
    cache: Path, batch: dict[str, Tensor]
) -> None:
    model = build(["norm"])
    before = facts(model)
    hooks = triton.knobs.runtime.jit_cache_hook, triton.knobs.compilation.listener

    def fails(model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(**batch).loss
        loss.backward()
        raise RuntimeError("in the middle")

    with no_gpu(90), pytest.raises(RuntimeError, match="in the middle"):
        fasttune.warmup(model, batch, loss_fn=fails)
    for after, expected in zip(facts(model), before, strict=True):
        assert_equal(after, expected)
    assert hooks == (triton.knobs.runtime.jit_cache_hook, triton.knobs.compilation.listener)
    lock = FileLock(cache / "fasttune-warmup.lock", 0.0)
    lock.acquire()
    assert not lock.timed_out
    lock.release()


def test_a_process_that_waits_too_long_goes_on_with_a_warning(
    cache: Path, batch: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    path = cache / "fasttune-warmup.lock"
    with path.open("w") as other, no_gpu(90), caplog.at_level(logging.WARNING, "fasttune"):
        fcntl.flock(other, fcntl.LOCK_EX)
        warm = fasttune.warmup(build(["norm"]), batch, timeout_s=0.2)
    assert warm.compiled and 0.2 < warm.waited_s < warm.seconds
    (message,) = (m for m in caplog.messages if "warmup" in m)
    assert str(path) in message and "more than 0.2 s" in message


def test_hooks_of_others_are_called_too(cache: Path, batch: dict[str, Tensor]) -> None:
    seen: list[str] = []
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    previous = runtime.jit_cache_hook, runtime.jit_post_compile_hook, compilation.listener
    runtime.jit_cache_hook = lambda **facts: seen.append("before")
    runtime.jit_post_compile_hook = lambda **facts: seen.append("after")
    compilation.listener = lambda **facts: seen.append("compiled")
    try:
        with no_gpu(90):
            warm = fasttune.warmup(build(["norm"]), batch)
    finally:
        runtime.jit_cache_hook, runtime.jit_post_compile_hook = previous[:2]
        compilation.listener = previous[2]
    assert warm.compiled
    assert seen == ["before", "compiled", "after"] * (len(warm.compiled) + len(warm.loaded))


def test_refusals(batch: dict[str, Tensor]) -> None:
    with pytest.raises(fasttune.PatchError, match="warmup: the model is not patched"):
        fasttune.warmup(with_lora(tiny_llama()), batch)
    with pytest.raises(ValueError, match="timeout_s: expected at least 0, got -1"):
        fasttune.warmup(build(), batch, timeout_s=-1)
    model = build()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    handle = optim.fuse_into_backward(model, optim.AdamW(trained, lr=0.1))
    with no_gpu(90), pytest.raises(fasttune.PatchError, match="has a hook that runs on its grad"):
        fasttune.warmup(model, batch)
    for check in (fasttune.verify, fasttune.compare):
        with pytest.raises(fasttune.PatchError, match="has a hook that runs on its gradient"):
            check(model, batch)
    assert all(torch.equal(p, value) for p, value in zip(trained, before, strict=True))
    handle.remove()
    assert fasttune.verify(model, batch).step


RANK = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import fasttune
from test_warmup import build, no_gpu

torch.set_num_threads(1)
dist.init_process_group("gloo")
model = DistributedDataParallel(build())
ids = torch.randint(3, 499, (2, 23), generator=torch.Generator().manual_seed(dist.get_rank()))
with no_gpu(90):
    warm = fasttune.warmup(model, {"input_ids": ids, "labels": ids})
print("compiled", *warm.compiled)
print("loaded", *warm.loaded)
dist.barrier()
dist.destroy_process_group()
"""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_of_two_ranks_one_compiles_each_kernel(cache: Path) -> None:
    """Inside DDP, where a rank that waited for another's whole step would wait for ever."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    program = cache / "program.py"
    program.write_text(RANK)
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": "2",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program)],
            env={**shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    found: dict[str, list[Counter[str]]] = {"compiled": [], "loaded": []}
    for rank, (out, error) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, error[-3000:]
        for line in out.splitlines():
            what, *names = line.split(" ")
            if what in found:
                found[what].append(Counter(names))
    (a, b), (loaded_by_a, loaded_by_b) = found["compiled"], found["loaded"]
    assert a + b, "nothing was compiled"
    # The ranks need the same kernels: what one has compiled, the other has loaded.
    assert a + loaded_by_a == b + loaded_by_b
    assert a <= loaded_by_b and b <= loaded_by_a
