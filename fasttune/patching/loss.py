"""The loss of a causal language model without its logits.

Two swaps work together: the model's forward (kind "loss") arms its head while labels are given in
training, and the armed head (kind "head") returns LazyLogits, which the model's loss_function
consumes with the fused linear cross-entropy.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fasttune import _torch
from fasttune.integrations import peft, peft_linear, transformers
from fasttune.ops import CrossEntropy, LoraBranch
from fasttune.ops.linear_cross_entropy import apply_head, check_targets
from fasttune.ops.policy import fast_backend_missing, loss_too_small
from fasttune.patching import assignment, guard, state, swap
from fasttune.patching.lazy_logits import LazyLogits, Snapshot, head_width
from fasttune.patching.session import EXCLUDED, Session
from fasttune.reason import Reason

KIND = "loss"
HEAD = "head"
_OWN_LOSS = Reason("the model computes its loss itself, without its loss_function")


def patch_models(session: Session) -> None:
    """Swap every causal language model and its head, and install the fused loss function."""
    for name, causal in transformers.models_with_head(session.model):
        if KIND in swap.kinds_of(causal):
            state.of(causal, KIND).strict = session.strict
            _swap_head(causal, session)  # PEFT may have wrapped the head since
        elif not session.chosen(name):
            session.skip(KIND, name, EXCLUDED)
        elif (owner := transformers.instance_forward_owner(causal)) is not None:
            session.skip(
                KIND, name, f"{owner} installed its own forward and stays in charge of the loss"
            )
        elif not transformers.is_causal_loss(transformers.loss_function(causal)):
            session.skip(KIND, name, "the loss is not transformers' causal language-model loss")
        elif (reason := why_head_original(transformers.head(causal))) is not None:
            session.skip(KIND, name, reason.text)
        else:
            _swap_head(causal, session)
            session.swap(causal, name, KIND)
            _install_loss_function(causal, session)
            causal.__dict__["_fasttune_adapters"] = peft.injected_adapters(causal)


def _swap_head(causal: nn.Module, session: Session) -> None:
    head = transformers.head(causal)
    if HEAD in swap.kinds_of(head):
        return
    swap.swap(head, HEAD)
    session.on_undo(lambda: swap.restore(head, HEAD))


def _install_loss_function(causal: nn.Module, session: Session) -> None:
    previous = transformers.own_loss_function(causal)
    original = transformers.loss_function(causal)
    fused = FusedCausalLMLoss(original, state.of(causal, KIND), previous)
    transformers.set_loss_function(causal, fused)
    session.on_undo(lambda: transformers.reset_loss_function(causal, previous))


def uninstall_loss_function(causal: nn.Module) -> None:
    """Undo what patching installed; a function that somebody else set since stays."""
    current = transformers.own_loss_function(causal)
    if isinstance(current, FusedCausalLMLoss):
        transformers.reset_loss_function(causal, current.previous)


class _Armed(threading.local):
    """Heads that return LazyLogits on this thread, by identity, with their model's record."""

    def __init__(self) -> None:
        self.heads: list[tuple[nn.Module, state.ModuleState]] = []


_armed = _Armed()


@contextlib.contextmanager
def _arm(head: nn.Module, record: state.ModuleState) -> Iterator[None]:
    _armed.heads.append((head, record))
    try:
        yield
    finally:
        _armed.heads.pop()


# ---------------------------------------------------------------------------- the model


def _model_forward(model: nn.Module, original: Any, *args: Any, **kwargs: Any) -> Any:
    if (
        torch.compiler.is_compiling()
        or not model.training
        or not _has_labels(original, args, kwargs)
    ):
        return original(model, *args, **kwargs)
    record = state.of(model, KIND)
    _warn_of_new_adapters(model)
    labels = kwargs.get("labels")
    if type(labels) is Tensor and (
        guard.was_small(record, labels, labels.numel())
        or guard.is_small(record, labels, _few_logits, model)
    ):
        return original(model, *args, **kwargs)
    reason = _why_original(model)
    if reason is not None:
        state.note_fallback(record, reason)
        return original(model, *args, **kwargs)
    before = record.calls
    with _arm(transformers.head(model), record):
        output = original(model, *args, **kwargs)
    if record.calls == before:
        state.note_fallback(record, _OWN_LOSS)
    return output


def _has_labels(original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None:
        return True
    if len(args) < 2:
        return False
    names = list(inspect.signature(original).parameters)[1:]  # without self
    return any(
        name == "labels" and value is not None for name, value in zip(names, args, strict=False)
    )


def _few_logits(labels: Tensor, model: nn.Module) -> bool:
    head = transformers.head(model)
    if HEAD not in swap.kinds_of(head):  # replaced: of an unknown class
        return False
    return loss_too_small(labels, labels.numel(), head_width(head))


def _why_original(model: nn.Module) -> Reason | None:
    if getattr(model, "_is_replica", False):
        return Reason("a DataParallel replica")
    if _torch.in_functorch():
        return Reason("called inside torch.func")
    head = transformers.head(model)
    if HEAD not in swap.kinds_of(head):
        return Reason("the output head was replaced after fasttune.patch; call it again")
    if not isinstance(transformers.loss_function(model), FusedCausalLMLoss):
        return Reason("the model's loss_function was replaced after fasttune.patch")
    reason = why_head_original(head)
    if reason is not None:
        return reason
    missing = fast_backend_missing(next(head.parameters()).device.type)
    return None if missing is None else Reason(missing)


def _warn_of_new_adapters(model: nn.Module) -> None:
    """LoRA layers injected after patch run PEFT's own forward: say so, once a set of adapters."""
    adapters = peft.injected_adapters(model)
    if model.__dict__.get("_fasttune_adapters") == adapters:
        return
    model.__dict__["_fasttune_adapters"] = adapters
    missed = [
        name
        for name, layer in peft.lora_layers(model)
        if peft_linear.is_linear(swap.original_class(layer)) and not swap.kinds_of(layer)
    ]
    if missed and state.on_first_rank():
        state.logger.warning(
            "%d LoRA layers were added after fasttune.patch and are not fused (first: %s); "
            "call fasttune.patch again",
            len(missed),
            missed[0],
        )


# ---------------------------------------------------------------------------- the head


def _head_forward(head: nn.Module, original: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    record = next((record for candidate, record in _armed.heads if candidate is head), None)
    if record is None or args or kwargs or type(hidden) is not Tensor:
        return original(head, hidden, *args, **kwargs)
    rows = hidden.numel() // max(hidden.size(-1), 1) if hidden.dim() else 0
    if loss_too_small(hidden, rows, head_width(head)):
        state.note_fallback(record, guard.TOO_SMALL)
        return original(head, hidden, *args, **kwargs)
    return LazyLogits(hidden, head, project, snapshot)


def project(head: nn.Module, hidden: Tensor) -> Tensor:
    """The head's own forward, through ``__call__`` so that its hooks run, without arming."""
    armed, _armed.heads = _armed.heads, []
    try:
        logits: Tensor = head(hidden)
        return logits
    finally:
        _armed.heads = armed


def snapshot(head: nn.Module) -> Snapshot:
    """What the head's logits depend on, for LazyLogits to see whether it changed."""
    module: Any = head
    facts: list[object] = []
    if peft.is_modules_to_save(module):
        module = peft.saved_module(module)
        facts.append(id(module))
    tensors: list[Tensor] = []
    if peft.loaded() and peft_linear.is_linear(swap.original_class(module)):
        facts += [module.disable_adapters, module.merged]
        for adapter in peft.active(module):
            scaling = module.scaling[adapter]
            facts += [adapter, id(scaling) if isinstance(scaling, Tensor) else scaling]
            for factor in (module.lora_A[adapter], module.lora_B[adapter]):
                tensors += list(factor.parameters())
        module = module.base_layer
    tensors += [t for t in (module.weight, module.bias) if t is not None]
    return Snapshot(tuple(tensors), tuple(t._version for t in tensors), tuple(facts))


def why_head_original(head: nn.Module) -> Reason | None:
    """Why the loss must see this head's logits, or None."""
    module: Any = head
    if _torch.hooked(module):
        return Reason("a hook on the output head")
    if peft.is_modules_to_save(module):
        module = peft.saved_module(module)
        if module is None:
            return Reason("several modules_to_save are active on the head")
        if _torch.hooked(module):
            return Reason("a hook on the output head")
    if peft.loaded() and peft_linear.is_linear(swap.original_class(module)):
        if assignment.names_of(module) is not None:
            return Reason("a mixed batch on the output head", expected=True)
        reason = (
            None if module.disable_adapters or module.merged else peft_linear.why_factors(module)
        )
        if reason is not None:
            return reason
        module = module.base_layer
        if _torch.hooked(module):
            return Reason("a hook on the output head")
    if swap.original_class(module) is not nn.Linear:
        return Reason(f"the output head is {swap.original_class(module).__name__}, not nn.Linear")
    weight = module._parameters.get("weight")
    if weight is None or type(weight) not in (Tensor, nn.Parameter) or not weight.numel():
        return Reason("the head's weight is quantised or sharded")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return Reason(f"the head's weight is {weight.dtype}")
    return None


def effective_head(head: nn.Module) -> tuple[Tensor, Tensor | None, list[LoraBranch]]:
    """Weight [V, H], bias [V] and LoRA branches of what the head computes now."""
    module: Any = head
    if peft.is_modules_to_save(module):
        module = peft.saved_module(module)
    branches: list[LoraBranch] = []
    if peft.loaded() and peft_linear.is_linear(swap.original_class(module)):
        if not module.disable_adapters and not module.merged:
            branches = list(peft_linear.branches(module))
        module = module.base_layer
    bias = module.bias
    for branch in branches:
        if branch.bias is not None:
            term = branch.bias * branch.scaling
            bias = term if bias is None else bias + term
    plain = [
        LoraBranch(branch.a, branch.b, branch.scaling, None, branch.dropout_p)
        for branch in branches
    ]
    return module.weight, bias, plain


# ---------------------------------------------------------------------------- the loss function


class FusedCausalLMLoss:
    """Stands in for ``transformers.loss.loss_utils.ForCausalLMLoss``, with its arguments and
    semantics."""

    def __init__(self, original: Any, record: state.ModuleState, previous: Any) -> None:
        self.original, self.record, self.previous = original, record, previous

    def __call__(
        self,
        logits: Any = None,
        labels: Any = None,
        vocab_size: int | None = None,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Any = None,
        **kwargs: Any,
    ) -> Any:
        if isinstance(logits, LazyLogits):
            reason = self._why_original(logits, vocab_size)
            if reason is None:
                return self._fused(logits, labels, num_items_in_batch, ignore_index, shift_labels)
            state.note_fallback(self.record, reason)
            logits = logits.materialize("the loss function")
        return self.original(
            logits=logits,
            labels=labels,
            vocab_size=vocab_size,
            num_items_in_batch=num_items_in_batch,
            ignore_index=ignore_index,
            shift_labels=shift_labels,
            **kwargs,
        )

    def _why_original(self, logits: LazyLogits, vocab_size: int | None) -> Reason | None:
        if logits.touched:
            return Reason(f"the model used the logits before the loss ({logits.touched[0]})")
        if vocab_size is not None and vocab_size != head_width(logits.head):
            return Reason(f"vocab_size {vocab_size} is not the head's {head_width(logits.head)}")
        if logits.scale_and_softcap() is None:
            return Reason("the arithmetic between head and loss is no scale and softcap")
        weight = effective_head(logits.head)[0]
        hidden = logits.hidden
        if hidden.device != weight.device:
            return Reason(f"hidden states on {hidden.device}, head on {weight.device}")
        if hidden.dtype != weight.dtype and logits.autocast_dtype is None:
            return Reason(f"hidden states are {hidden.dtype}, the head is {weight.dtype}")
        return None

    def _fused(
        self,
        logits: LazyLogits,
        labels: Any,
        num_items_in_batch: Any,
        ignore_index: int,
        shift_labels: Any,
    ) -> Tensor:
        hidden = logits.hidden
        if shift_labels is None:
            padded = nn.functional.pad(labels, (0, 1), value=ignore_index)
            shift_labels = padded[..., 1:]
        targets = shift_labels.reshape(-1).to(hidden.device)
        check_targets(targets, (hidden.shape[:-1].numel(),), head_width(logits.head), ignore_index)
        weight, bias, branches = effective_head(logits.head)
        scale, softcap = logits.scale_and_softcap() or (1.0, 0.0)
        row_loss = CrossEntropy(ignore_index, logit_scale=scale, softcap=softcap)
        dtype = logits.autocast_dtype or hidden.dtype
        total = apply_head(hidden, weight, targets, bias, branches, row_loss, dtype)[0]
        state.note_fused(self.record, backend_of(total), saved_bytes_of(total))
        if (adapter := state.all_of(logits.head).get("lora")) is not None:
            state.note_fused(adapter, backend_of(total), 0)  # its branches ran inside the loss
        if num_items_in_batch is None:
            num_items_in_batch = (targets != ignore_index).sum()
        elif isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        loss: Tensor = total / num_items_in_batch
        return loss


def backend_of(output: Tensor) -> str:
    """The backend that computed an output of one of our Functions; "" without a graph."""
    backend = getattr(output.grad_fn, "backend", None)
    return backend.name if backend is not None else ""


def saved_bytes_of(output: Tensor) -> int:
    """Bytes that the Function behind an output saved; 0 without a graph."""
    return int(getattr(output.grad_fn, "saved_bytes", 0))


swap.register_kind(KIND, _model_forward)
swap.register_kind(HEAD, _head_forward)
