"""patch and unpatch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from fasttune import _registry
from fasttune.errors import PatchError
from fasttune.integrations import peft, transformers
from fasttune.patching import lora, loss, sharding, state, swap

KINDS = ("lora", "loss")

_ROOT = "_fasttune_root"


def patch(
    model: nn.Module,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    kinds: Iterable[str] | None = None,
    fused_loss: bool = True,
    strict: bool = False,
) -> nn.Module:
    """Replace what fasttune can compute faster and proves equal, in place.

    Idempotent and incremental: call it again after ``get_peft_model`` or ``add_adapter``.
    Parameters, state_dict keys and hooks stay; what is not covered takes the original path, counted
    with its reason (:func:`fasttune.explain`).

    Args:
        model: any module: a PeftModel, a transformers model with adapters, or a module that
            contains them.
        include: patch only modules with these names or name endings, as PEFT's ``target_modules``;
            None means all.
        exclude: leave these modules alone.
        kinds: subset of {"lora", "loss"}; None means all.
        fused_loss: False keeps the model's own loss (the same as leaving "loss" out of kinds).
        strict: raise PatchError if nothing fits, and at the first call that takes the original
            path.

    Returns:
        The same model.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: an unknown kind.
        PatchError: parameters are already sharded (FSDP, ZeRO-3): patch before sharding; or strict
            and nothing fits. The model is then as it was before the call.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    wanted = _check_kinds(kinds, fused_loss)
    _registry.forced_backend()  # a misspelt FASTTUNE_BACKEND shows here, not at the first forward
    if os.environ.get("FASTTUNE_DISABLE", "0").lower() not in ("", "0", "false", "no", "off"):
        state.logger.warning("FASTTUNE_DISABLE is set: fasttune.patch leaves the model as it is")
        return model
    sharding.refuse_sharded(model)
    chosen = _Filter(include, exclude)
    _warn_of_unknown_names(model, chosen)
    if _narrower(model, wanted, chosen):
        unpatch(model)
    undo: list[Callable[[], None]] = []
    skipped: dict[str, str] = {}
    try:
        if "lora" in wanted:
            _patch_lora(model, chosen, strict, undo, skipped)
        if "loss" in wanted:
            _patch_loss(model, chosen, strict, undo, skipped)
        if not any(state.all_of(module) for module in model.modules()):
            _nothing_to_patch(model, skipped, strict)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    model.__dict__[_ROOT] = {"skipped": skipped, "kinds": sorted(wanted)}
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Restore every module to its class before :func:`patch`; outputs and types are as before.

    Returns:
        The same model. Unpatching a model that is not patched warns and does nothing.

    Raises:
        TypeError: model is no nn.Module.
        PatchError: another library swapped a class on top of ours (FSDP2, parametrize); nothing is
            changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    swapped = [module for module in model.modules() if swap.kinds_of(module)]
    if not swapped:
        state.logger.warning("fasttune.unpatch: the model is not patched")
        model.__dict__.pop(_ROOT, None)
        return model
    for module in swapped:
        for kind in reversed(swap.kinds_of(module)):
            swap.check_restorable(module, kind)
            break
    for module in swapped:
        for kind in reversed(swap.kinds_of(module)):
            if kind == loss.KIND:
                _uninstall_loss_function(module)
            swap.restore(module, kind)
            state.detach(module, kind)
        module.__dict__.pop("_fasttune_adapters", None)
    model.__dict__.pop(_ROOT, None)
    return model


def skipped_of(model: nn.Module) -> dict[str, str]:
    """Modules that the last patch of this model left alone, with the reason."""
    skipped: dict[str, str] = model.__dict__.get(_ROOT, {}).get("skipped", {})
    return skipped


def is_patched(model: nn.Module) -> bool:
    """True if any module of the model carries one of our classes."""
    return any(swap.kinds_of(module) for module in model.modules())


# ---------------------------------------------------------------------------- kinds


def _patch_lora(
    model: nn.Module,
    chosen: _Filter,
    strict: bool,
    undo: list[Callable[[], None]],
    skipped: dict[str, str],
) -> None:
    for name, layer in peft.lora_layers(model):
        if not chosen(name):
            skipped[name] = "left out by include / exclude"
        elif not peft.is_linear(swap.original_class(layer)):
            skipped[name] = f"LoRA on {swap.original_class(layer).__name__} is not fused yet"
        elif lora.KIND in swap.kinds_of(layer):
            state.of(layer, lora.KIND).strict = strict
        elif (reason := _cannot_swap(layer) or peft.static_reason(layer)) is not None:
            skipped[name] = reason if isinstance(reason, str) else reason.text
        else:
            _swap(layer, name, lora.KIND, strict, undo)
    for name, layer in peft.other_tuner_layers(model):
        skipped[name] = f"PEFT method {type(layer).__name__} is not fused yet"


def _patch_loss(
    model: nn.Module,
    chosen: _Filter,
    strict: bool,
    undo: list[Callable[[], None]],
    skipped: dict[str, str],
) -> None:
    for name, causal in transformers.models_with_head(model):
        label = f"{name or type(causal).__name__} (loss)"
        if loss.KIND in swap.kinds_of(causal):
            state.of(causal, loss.KIND).strict = strict
            _swap_head(causal, name, strict, undo)  # PEFT may have wrapped the head since
        elif not chosen(name):
            skipped[label] = "left out by include / exclude"
        elif (owner := transformers.instance_forward_owner(causal)) is not None:
            skipped[label] = f"{owner} installed its own forward and stays in charge of the loss"
        elif not transformers.is_causal_loss(transformers.loss_function(causal)):
            skipped[label] = "the loss is not transformers' causal language-model loss"
        elif (reason := loss.why_head_original(transformers.head(causal))) is not None:
            skipped[label] = reason.text
        else:
            _swap_head(causal, name, strict, undo)
            _swap(causal, name, loss.KIND, strict, undo)
            _install_loss_function(causal, undo)
            causal.__dict__["_fasttune_adapters"] = peft.injected_adapters(causal)


def _swap(
    module: nn.Module, name: str, kind: str, strict: bool, undo: list[Callable[[], None]]
) -> None:
    swap.swap(module, kind)

    def take_back() -> None:
        swap.restore(module, kind)
        state.detach(module, kind)

    undo.append(take_back)
    state.attach(module, state.ModuleState(name or type(module).__name__, kind, strict))


def _swap_head(causal: nn.Module, name: str, strict: bool, undo: list[Callable[[], None]]) -> None:
    head = transformers.head(causal)
    if loss.HEAD in swap.kinds_of(head):
        return
    swap.swap(head, loss.HEAD)
    undo.append(lambda: swap.restore(head, loss.HEAD))


def _install_loss_function(causal: nn.Module, undo: list[Callable[[], None]]) -> None:
    previous = transformers.own_loss_function(causal)
    original = transformers.loss_function(causal)
    fused = loss.FusedCausalLMLoss(original, state.of(causal, loss.KIND), previous)
    transformers.set_loss_function(causal, fused)
    undo.append(lambda: transformers.reset_loss_function(causal, previous))


def _uninstall_loss_function(causal: nn.Module) -> None:
    current = transformers.own_loss_function(causal)
    if isinstance(current, loss.FusedCausalLMLoss):  # else somebody replaced it since: theirs stays
        transformers.reset_loss_function(causal, current.previous)


def _cannot_swap(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "an instance-level forward is installed"
    return None


# ---------------------------------------------------------------------------- arguments


class _Filter:
    """Names as PEFT's target_modules: the full name or an ending of it at a dot."""

    def __init__(
        self, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
    ) -> None:
        self.include = _names("include", include)
        self.exclude = _names("exclude", exclude)

    def __call__(self, name: str) -> bool:
        if self.exclude is not None and _matches(name, self.exclude):
            return False
        return self.include is None or _matches(name, self.include)


def _names(argument: str, value: str | Sequence[str] | None) -> list[str] | None:
    if value is None:
        return None
    names = [value] if isinstance(value, str) else list(value)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{argument}: expected module names, got {type(name).__name__}")
    return names


def _matches(name: str, patterns: list[str]) -> bool:
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _check_kinds(kinds: Iterable[str] | None, fused_loss: bool) -> set[str]:
    wanted = set(KINDS if kinds is None else [kinds] if isinstance(kinds, str) else kinds)
    unknown = wanted - set(KINDS)
    if unknown:
        raise ValueError(f"kinds: expected a subset of {set(KINDS)}, got {sorted(unknown)}")
    return wanted if fused_loss else wanted - {"loss"}


def _narrower(model: nn.Module, wanted: set[str], chosen: _Filter) -> bool:
    """True if something that is patched falls outside the new selection."""
    for name, module in model.named_modules():
        for kind in state.all_of(module):
            if kind not in wanted or not chosen(name):
                return True
    return False


def _warn_of_unknown_names(model: nn.Module, chosen: _Filter) -> None:
    names = [name for name, _ in model.named_modules()]
    for argument, patterns in (("include", chosen.include), ("exclude", chosen.exclude)):
        for pattern in patterns or ():
            if not any(_matches(name, [pattern]) for name in names):
                state.logger.warning("%s: no module is named %r", argument, pattern)


def _nothing_to_patch(model: nn.Module, skipped: dict[str, str], strict: bool) -> None:
    reasons = sorted(set(skipped.values()))
    detail = "; ".join(reasons) or (
        "no LoRA layer and no causal language model was found "
        "(call fasttune.patch after get_peft_model)"
    )
    message = f"fasttune.patch found nothing to fuse in {type(model).__name__}: {detail}"
    if strict:
        raise PatchError(message)
    state.logger.warning(message)
