"""Which tokens of a batch are its prompts: read from the arguments of the model's forward.

A hook before the model's forward reads them and one after it forgets them. What cannot be known
raises ValueError: a guess would edit the wrong tokens and say nothing.

- Real tokens are those of the 2-D ``attention_mask``; without a mask the model attends to all, so
  all are real.
- With ``prompt_mask`` [B, S], which the model itself does not get, the prompt is what it marks.
- Of a model that generates, the prompt is what comes before the first label that is not -100; in
  training one of the two must be there. Otherwise the whole input is the prompt.
- Steps of ``generate`` after the first one, one token with a filled cache, have no prompt.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn

from fasttune.adapters._positions import Positions

PROMPT_MASK = "prompt_mask"
_CACHES = ("cache", "past_key_values", "cache_params")
_PACKED = ("cu_seq_lens_q", "cu_seqlens", "seq_idx")
_IGNORED = -100


class Prompt:
    """The prompts of one forward of a model.

    Attributes:
        model: that is called.
        absent: nothing of this forward is a prompt.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.absent = False
        self._real: Tensor | None = None  # [B, S] bool; None: all
        self._marked: Tensor | None = None  # [B, S] bool; None: all real ones
        self._rows: dict[Any, Tensor] = {}

    def read(self, given: dict[str, Any], prompt_mask: Any) -> None:
        """Take what the arguments of a forward say."""
        tokens = _tokens(given)
        for name in _PACKED:
            if given.get(name) is not None:
                raise ValueError(f"{name}: expected one sequence a row, got packed ones")
        seen = _cached(given)
        if seen and tokens is not None:
            if tokens.shape[1] == 1 and prompt_mask is None:
                self.absent = True
                return
            raise ValueError(
                "cache: expected an empty one, or one new token: which of "
                f"{tokens.shape[1]} tokens after {seen} are the prompt is unknown"
            )
        self._real = _real_tokens(given, tokens, self.model)
        if prompt_mask is not None:
            self._marked = _checked_mask(PROMPT_MASK, prompt_mask, tokens)
            return
        if tokens is None or not _generates(self.model, given, tokens):
            return
        labels = given.get("labels")
        if isinstance(labels, Tensor) and labels.shape == tokens.shape[:2]:
            self._marked = self._before_labels(labels)
        elif self.model.training and torch.is_grad_enabled():
            raise ValueError(
                "labels: expected ones with -100 on the prompt, or a prompt_mask, in the training "
                "of a model that generates, got neither"
            )
        elif given.get("use_cache") is False and not torch.is_grad_enabled():
            raise ValueError(
                "use_cache: expected generation with a cache, or a prompt_mask: without, generated "
                "tokens come back as if they were the prompt"
            )

    def _before_labels(self, labels: Tensor) -> Tensor:
        answer = labels != _IGNORED
        before = answer.cumsum(1) == 0
        prompt = before if self._real is None else before & self._real.to(before.device)
        if bool((answer.any(1) & ~prompt.any(1)).any()):
            raise ValueError(
                "labels: expected -100 on the prompt of every row, got a row that is labelled from "
                "its first token on; mark the prompts with a prompt_mask"
            )
        return before

    def rows(self, positions: Positions, part: str, hidden: Tensor) -> Tensor:
        """The rows of ``hidden`` [B, S, H] that the positions mean."""
        key = (positions, part, hidden.shape[:2], hidden.device)
        if key not in self._rows:
            prompt = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            for name, mask in (("attention_mask", self._real), (PROMPT_MASK, self._marked)):
                if mask is None:
                    continue
                if mask.shape != prompt.shape:
                    raise ValueError(
                        f"{name}: expected shape {list(prompt.shape)}, as the hidden states, got "
                        f"{list(mask.shape)}"
                    )
                prompt = prompt & mask.to(prompt.device)
            self._rows[key] = positions.rows(prompt, part)
        return self._rows[key]


class _Current(threading.local):
    def __init__(self) -> None:
        self.prompts: list[Prompt] = []


_current = _Current()


def current() -> Prompt:
    """The prompts of the forward that runs on this thread.

    Raises:
        RuntimeError: none runs.
    """
    if not _current.prompts:
        raise RuntimeError(
            "reft: expected a call of the model that add_reft got: a part of it was called on its "
            "own, its forward was called without its hooks, or a checkpoint recomputes a block "
            "together with its hooks"
        )
    return _current.prompts[-1]


def attach(model: nn.Module) -> None:
    """Read the prompts of every forward of ``model``."""
    model.register_forward_pre_hook(_enter, with_kwargs=True)
    model.register_forward_hook(_leave, always_call=True)


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`."""
    for hooks, own in ((model._forward_pre_hooks, _enter), (model._forward_hooks, _leave)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
            model._forward_hooks_always_called.pop(key, None)


def _enter(model: nn.Module, args: Any, kwargs: Any) -> Any:
    prompt = Prompt(model)
    _current.prompts.append(prompt)  # first: _leave runs after an error too
    mask = kwargs.pop(PROMPT_MASK, None)
    prompt.read(_arguments(model, args, kwargs), mask)
    return args, kwargs


def _leave(model: nn.Module, args: Any, output: Any) -> None:
    if _current.prompts and _current.prompts[-1].model is model:
        _current.prompts.pop()


def _arguments(model: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name."""
    signature = inspect.signature(model.forward)
    given = signature.bind_partial(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given


def _tokens(given: dict[str, Any]) -> Tensor | None:
    """What tells the batch and the number of tokens: input_ids, else inputs_embeds."""
    found = given.get("input_ids")
    tokens: Tensor | None = given.get("inputs_embeds") if found is None else found
    return tokens


def _cached(given: dict[str, Any]) -> int:
    """How many tokens are in the cache that a forward gets."""
    for name in _CACHES:
        cache = given.get(name)
        if cache is None:
            continue
        if not hasattr(cache, "get_seq_length"):
            raise ValueError(f"{name}: expected a cache that tells its length, got {type(cache)}")
        return int(cache.get_seq_length())
    return 0


def _real_tokens(given: dict[str, Any], tokens: Tensor | None, model: Any) -> Tensor | None:
    mask = given.get("attention_mask")
    if mask is not None:
        return _checked_mask("attention_mask", mask, tokens)
    places = given.get("position_ids")
    restarts = isinstance(places, Tensor) and places.dim() == 2 and places.diff(dim=1) < 0
    if isinstance(restarts, Tensor) and bool(restarts.any()):
        raise ValueError("position_ids: expected one sequence a row, got ones that restart")
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    ids = given.get("input_ids")
    edges = None if ids is None or padding is None or not ids.numel() else ids[:, [0, -1]]
    if edges is not None and bool((edges == padding).any()):
        raise ValueError(
            "attention_mask: expected one, as input_ids may be padded: its first or last column "
            "has the padding token"
        )
    return None


def _checked_mask(name: str, mask: Any, tokens: Tensor | None) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name}: expected a mask [batch, tokens], got {got}")
    if tokens is not None and mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"{name}: expected shape {list(tokens.shape[:2])}, as the input, got {list(mask.shape)}"
        )
    return mask != 0


def _generates(model: Any, given: dict[str, Any], tokens: Tensor) -> bool:
    """Do the labels of ``model`` continue its input? A model that cannot say so must be told."""
    ask = getattr(model, "can_generate", None)
    if ask is not None:
        return bool(ask())
    labels = given.get("labels")
    if isinstance(labels, Tensor) and labels.shape == tokens.shape[:2]:
        raise ValueError(
            f"labels: expected a prompt_mask beside them, as {type(model).__name__} does not tell "
            "whether it generates"
        )
    return False
