"""mixed_adapters: every sample of a batch has its own adapter, in training too."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn

from fasttune.errors import PatchError
from fasttune.integrations import peft, peft_linear, peft_mixed
from fasttune.patching import assignment, lora, swap


@contextlib.contextmanager
def mixed_adapters(
    model: nn.Module, names: Sequence[str], *, frozen: Collection[str] = ()
) -> Iterator[None]:
    """In this context, sample i of every batch runs with adapter ``names[i]``, in training too.

    The adapters need not be the active ones, and which are active does not matter. A layer that
    lacks an adapter computes its base layer for the adapter's samples, as PEFT does. The base
    product runs once for the whole batch. An adapter without a sample gets no gradient (None), so
    that weight decay leaves it alone. The context belongs to the thread that entered it; an inner
    context for the same model replaces the outer one until it is left. Backward may run after the
    context, gradient checkpointing by ``gradient_checkpointing_enable`` included.

    ``requires_grad`` is never changed: PEFT freezes what is not active, so call
    ``model.set_requires_grad(["de", "fr"])`` once before making the optimizer.

    Args:
        model: a model with PEFT adapters, after :func:`fasttune.patch`.
        names: one adapter name for each sample of the batch, in order; ``"__base__"`` for none.
        frozen: adapters in ``names`` that are meant not to train.

    Raises:
        TypeError: model is no module, or names no sequence of strings.
        ValueError: an unknown adapter; in training mode an adapter whose parameters require no
            gradient and that is not in ``frozen``; at the first forward, a batch of another size.
        PatchError: the model is not patched or compiled; adapters are merged; a layer that holds a
            named or an active adapter cannot give each sample its own (DoRA and other variants,
            quantised base layers, embeddings, convolutions, modules_to_save, trainable tokens,
            layers that fasttune.patch left out). Nothing is changed then.

    Semantics: ``adapter_names`` of PEFT 0.21, which is for inference only.
    """
    given = _checked_names(names)
    layers = _checked_layers(model, set(given) - {peft_mixed.BASE})
    _check_whole_batch_modules(model, layers, set(given) - {peft_mixed.BASE})
    if model.training and torch.is_grad_enabled():
        _check_trained(layers, given, frozen)
    with (
        assignment.assigned([layer for _, layer in layers], given),
        assignment.bound_checkpointing(model),
    ):
        yield


_Layers = list[tuple[str, nn.Module]]


def _checked_names(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"names: expected a sequence of adapter names, got {type(names).__name__}")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"names: expected strings, got {type(name).__name__}")
    return tuple(names)


def _checked_layers(model: nn.Module, wanted: set[str]) -> _Layers:
    """The patched LoRA Linears, after checking that the mix can run on every LoRA layer."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = list(peft.lora_layers(model))
    layers = [(name, layer) for name, layer in found if lora.KIND in swap.kinds_of(layer)]
    if not layers:
        raise PatchError("model: no patched LoRA layer; call fasttune.patch(model) first")
    known = set().union(*(peft_mixed.adapters_of(layer) for _, layer in found))
    if unknown := sorted(wanted - known):
        raise ValueError(f"names: no adapter {unknown[0]!r} in the model; it has {sorted(known)}")
    if any(module._compiled_call_impl is not None for module in model.modules()) or hasattr(
        model, "_orig_mod"
    ):
        raise PatchError("model: a compiled model cannot run mixed batches")
    for name, layer in found:
        reason = _why_not(layer, wanted)
        if reason is not None:
            raise PatchError(f"model: {name} cannot run a mixed batch: {reason}")
    return layers


def _why_not(layer: nn.Module, wanted: set[str]) -> str | None:
    """Why a LoRA layer cannot give each sample its own adapter; None if it can or need not."""
    own = peft_mixed.adapters_of(layer)
    if peft.is_merged(layer):
        return "adapters are merged, call unmerge_adapter first"
    if not own & (wanted | peft.active_names(layer)):
        return None
    cls = swap.original_class(layer)
    if not peft_linear.is_linear(cls):
        return f"LoRA on {cls.__name__} has one adapter for all samples"
    static = peft_linear.static_reason(layer)
    if static is not None:
        return static.text
    if lora.KIND not in swap.kinds_of(layer):
        return "fasttune.patch left it out"
    for adapter in sorted(own & wanted):
        reason = peft_linear.why_factors(layer, [adapter])
        if reason is not None:
            return f"adapter {adapter!r}: {reason.text}"
    return None


def _check_whole_batch_modules(model: nn.Module, layers: _Layers, wanted: set[str]) -> None:
    """Raises for modules that serve one adapter at a time."""
    concerned = wanted.union(*(peft.active_names(layer) for _, layer in layers))
    for name, adapters in peft_mixed.copies_of_modules(model):
        if shared := sorted(adapters & concerned):
            raise PatchError(
                f"model: {name} cannot run a mixed batch: modules_to_save or trainable tokens of "
                f"adapter {shared[0]!r} replace it for all samples"
            )
    for name, tuner in peft.other_tuner_layers(model):
        raise PatchError(
            f"model: {name} cannot run a mixed batch: {type(tuner).__name__} is not LoRA"
        )


def _check_trained(layers: _Layers, names: Sequence[str], frozen: Collection[str]) -> None:
    for adapter in dict.fromkeys(names):
        if adapter == peft_mixed.BASE or adapter in frozen:
            continue
        if not any(peft_mixed.trains(layer, adapter) for _, layer in layers):
            raise ValueError(
                f"names: no parameter of adapter {adapter!r} requires a gradient; call "
                f"model.set_requires_grad({adapter!r}), or pass frozen=[{adapter!r}]"
            )
