"""patch and unpatch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from torch import nn

from fasttune import _registry
from fasttune.errors import PatchError
from fasttune.integrations import transformers
from fasttune.patching import (
    activation,
    attention,
    experts,
    ia3,
    lora,
    loss,
    lowrank,
    mlp,
    norm,
    prefix,
    sharding,
    state,
    swap,
    tokens,
)
from fasttune.patching.groups import forget
from fasttune.patching.selection import Selection
from fasttune.patching.session import Session

# In the order of patching: the loss looks at heads that LoRA may have wrapped.
_PATCHERS = {
    lora.KIND: lora.patch_layers,
    lowrank.KIND: lowrank.patch_layers,
    experts.KIND: experts.patch_layers,
    ia3.KIND: ia3.patch_layers,
    tokens.KIND: tokens.patch_layers,
    prefix.KIND: prefix.patch_layers,
    loss.KIND: loss.patch_models,
    norm.KIND: norm.patch_layers,
    mlp.KIND: mlp.patch_layers,
    activation.KIND: activation.patch_layers,
    attention.KIND: attention.patch_layers,
}
KINDS = tuple(_PATCHERS)

_ROOT = "_fasttune_root"


def patch(
    model: nn.Module,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    kinds: Iterable[str] | None = None,
    fused_loss: bool = True,
    groups: bool = True,
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
        kinds: subset of {"lora", "lowrank", "experts", "ia3", "tokens", "prefix", "loss", "norm",
            "mlp", "activation", "attention"}; None means all.
        fused_loss: False keeps the model's own loss (the same as leaving "loss" out of kinds).
        groups: compute LoRA layers that share an input (q, k and v; gate and up) by one op, once
            they were seen to share it (groups.py); False computes each alone.
        strict: raise PatchError if nothing fits, and at the first call that takes the original
            path.

    Returns:
        The same model.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: an unknown kind.
        PatchError: parameters are already sharded (FSDP, ZeRO-3): patch before sharding; the model
            runs kernels of the hub (use_kernels=True); or strict and nothing fits. The model is
            then as it was before the call.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    wanted = _check_kinds(kinds, fused_loss)
    _registry.read_environment()
    _registry.forced_backend()  # a misspelt FASTTUNE_BACKEND shows here, not at the first forward
    if os.environ.get("FASTTUNE_DISABLE", "0").lower() not in ("", "0", "false", "no", "off"):
        state.logger.warning("FASTTUNE_DISABLE is set: fasttune.patch leaves the model as it is")
        return model
    sharding.refuse_sharded(model)
    _refuse_hub_kernels(model)
    chosen = Selection(include, exclude)
    chosen.warn_of_unknown_names(model)
    if _narrower(model, wanted, chosen):
        unpatch(model)
    session = Session(model, chosen, strict, groups)
    try:
        for kind, patcher in _PATCHERS.items():
            if kind in wanted:
                patcher(session)
        if not any(state.all_of(module) for module in model.modules()):
            _nothing_to_patch(session)
    except BaseException:
        session.take_back()
        raise
    model.__dict__[_ROOT] = {"skipped": session.skipped, "kinds": sorted(wanted)}
    return model


def _refuse_hub_kernels(model: nn.Module) -> None:
    name = transformers.with_hub_kernels(model)
    if name is not None:
        raise PatchError(
            f"model: {name} has use_kernels=True, so forwards of the kernels library are installed "
            "on the modules that fasttune would patch; load it with use_kernels=False"
        )


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
    forget(swapped)
    for module in swapped:
        for kind in reversed(swap.kinds_of(module)):
            if kind == loss.KIND:
                loss.uninstall_loss_function(module)
            swap.restore(module, kind)
            state.detach(module, kind)
        module.__dict__.pop("_fasttune_adapters", None)
    model.__dict__.pop(_ROOT, None)
    return model


def skipped_of(model: nn.Module) -> dict[tuple[str, str], str]:
    """(kind, name) of the modules that the last patch left alone, with the reason."""
    skipped: dict[tuple[str, str], str] = model.__dict__.get(_ROOT, {}).get("skipped", {})
    return skipped


def is_patched(model: nn.Module) -> bool:
    """True if any module of the model carries one of our classes."""
    return any(swap.kinds_of(module) for module in model.modules())


def _check_kinds(kinds: Iterable[str] | None, fused_loss: bool) -> set[str]:
    wanted = set(KINDS if kinds is None else [kinds] if isinstance(kinds, str) else kinds)
    unknown = wanted - set(KINDS)
    if unknown:
        raise ValueError(f"kinds: expected a subset of {set(KINDS)}, got {sorted(unknown)}")
    return wanted if fused_loss else wanted - {"loss"}


def _narrower(model: nn.Module, wanted: set[str], chosen: Selection) -> bool:
    """True if something that is patched falls outside the new selection."""
    for name, module in model.named_modules():
        for kind in state.all_of(module):
            if kind not in wanted or not chosen(name):
                return True
    return False


def _nothing_to_patch(session: Session) -> None:
    model, strict = session.model, session.strict
    reasons = sorted(set(session.skipped.values()))
    detail = "; ".join(reasons) or (
        "no layer of LoRA, VeRA, AdaLoRA, DeLoRA or (IA)^3, causal language model, norm, gated "
        "MLP, activation or attention was found (call fasttune.patch after get_peft_model)"
    )
    message = f"fasttune.patch found nothing to fuse in {type(model).__name__}: {detail}"
    if strict:
        raise PatchError(message)
    state.logger.warning(message)
