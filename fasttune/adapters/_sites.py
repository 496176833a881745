"""Where a model takes bottleneck adapters: found by what a forward of its repeated blocks does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fasttune.adapters._trace import Trace, base, trace, walk, width
from fasttune.patching.swap import original_class

PLACEMENTS = (
    "seq_bn", "double_seq_bn", "par_bn", "adapter_plus", "hub_seq_bn", "hub_par_bn",
    "hub_double_seq_bn",
)  # fmt: skip
CONVOLUTIONS = ("conv_parallel", "conv_sequential")


@dataclass(frozen=True)
class Site:
    """A layer, or a block, whose output an adapter is added to.

    Attributes:
        width: of the output.
        linear: the linear layer or convolution whose dtype and device the adapter has.
        block: the block that it is of.
        attention: True at the end of an attention, False at the end of the MLP or the block.
        cross: True if that attention is one to another sequence, of a decoder to its encoder.
        source: the layer whose input the adapter takes; None: the output of this one.
        before: the adapter's output is added to the input of this layer, a norm, which then runs
            again.
    """

    width: int
    linear: str
    block: str
    attention: bool = False
    cross: bool = False
    source: str | None = None
    before: bool = False


def find(
    model: nn.Module, placement: str, example: Mapping[str, Any] | None = None
) -> dict[str, Site]:
    """By name, the layers whose output an adapter is added to.

    ``seq_bn``: the last linear layer of every MLP (Pfeiffer et al., 2020); ``double_seq_bn``: the
    last one of every attention too (Houlsby et al., 2019); ``par_bn``: the last one of every MLP,
    with the input of its first one (He et al., 2022); ``adapter_plus``: the block itself, after its
    last residual (Steitz and Roth, 2024). As the library adapters places them, ``hub_seq_bn``: the
    block, or the input of the norm that ends it, with the output of that norm; ``hub_par_bn``: the
    last linear layer of every MLP, with the residual beside it; ``hub_double_seq_bn``: those of
    ``double_seq_bn`` but for the attentions of a decoder to its encoder.

    ``conv_parallel`` and ``conv_sequential``: the first convolution wider than 1x1 of every
    residual block, with its input or its output (Chen et al., 2022).

    Raises:
        ValueError: there is no such placement, or the structure is not recognised.
    """
    known = (*PLACEMENTS, *CONVOLUTIONS)
    if placement not in known:
        raise ValueError(f"placement: expected one of {', '.join(known)}, got {placement!r}")
    found = trace(model, example)
    if placement in CONVOLUTIONS:
        return _convolutions(model, found, placement)
    sites: dict[str, Site] = {}
    for name in _blocks(model, found, whole=example is None):
        sites.update(_sites_of(_Block(model, found, name), placement))
    if not sites:
        raise ValueError(f"{_EXPECTED}, got none in {type(model).__name__}{_why(found)}")
    return sites


def blocks(model: nn.Module) -> list[str]:
    """The names of the repeated blocks that attend.

    Raises:
        ValueError: no forward reaches some of them.
    """
    return _blocks(model, trace(model), whole=True)


_EXPECTED = (
    "model: expected a ModuleList of layers of one class, each with an attention and an MLP of "
    "linear layers"
)


def _convolutions(model: nn.Module, found: Trace, placement: str) -> dict[str, Site]:
    """Of the innermost called modules that add and have convolutions, the first of those."""
    convolutions = {key: base(module) for key, module in walk(model) if key in found.calls}
    wide = [key for key in found.calls if _is_wide(convolutions.get(key))]
    adding = [key for key, call in found.calls.items() if call.adds and _inside(key, wide)]
    sites: dict[str, Site] = {}
    for key in adding:
        if _inside(key, adding):
            continue
        name = _inside(key, wide)[0]
        source = name if placement == "conv_parallel" else None
        sites[name] = Site(convolutions[name].out_channels, name, key, source=source)
        _check_image(name, convolutions[name], found)
    if not sites:
        raise ValueError(
            "model: expected residual blocks with convolutions wider than 1x1, got none in "
            f"{type(model).__name__}{_why(found)}"
        )
    return sites


def _is_wide(module: Any) -> bool:
    return isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1


def _check_image(name: str, module: nn.Conv2d, found: Trace) -> None:
    """A subclass that pads in its own forward has an output of another size."""
    call, options = found.calls[name], (module.kernel_size, module.stride, module.padding)
    with torch.device("meta"):
        plain = nn.Conv2d(module.in_channels, 1, *options, module.dilation)  # type: ignore[arg-type]
        expected = plain(torch.empty(call.inputs[0].shape)).shape[-2:]
    if expected != call.outputs[0].shape[-2:]:
        raise ValueError(
            f"model: expected an image of {tuple(expected)} from {name}, got "
            f"{tuple(call.outputs[0].shape[-2:])}"
        )


def _why(found: Trace) -> str:
    return f" ({found.failures[0]}; adapters.add takes an example)" if found.failures else ""


def _blocks(model: nn.Module, found: Trace, *, whole: bool) -> list[str]:
    stacks: dict[str, list[str]] = {}
    for name, stack in walk(model):
        if not isinstance(stack, nn.ModuleList):
            continue
        if len({original_class(block) for block in stack}) != 1:
            continue
        members = [f"{name}.{i}" for i in range(len(stack))]
        linear = all(any(width(m) for _, m in walk(block)) for block in stack)
        if all(key in found.calls for key in members):
            if linear and all(_Block(model, found, key).attentions for key in members):
                stacks[name] = members
        elif whole and linear and len(members) > 1 and not _within(name, _members(stacks)):
            reason = found.failures[0] if found.failures else "the forward leaves it out"
            raise ValueError(
                f"model: expected a forward that runs {name}, got none ({reason}); adapters.add "
                "takes an example"
            )
    for name in list(stacks):  # outer ones first
        if name in stacks:
            inner = [key for key in stacks if _within(key, stacks[name])]
            for key in [name] if _are_stages(model, stacks, name, inner) else inner:
                del stacks[key]
    return _members(stacks)


def _members(stacks: Mapping[str, list[str]]) -> list[str]:
    return [member for members in stacks.values() for member in members]


def _are_stages(
    model: nn.Module, stacks: Mapping[str, list[str]], name: str, inner: list[str]
) -> bool:
    """True if the members of a stack are stages of several blocks, or of blocks and more."""

    def count(names: Sequence[str]) -> int:
        return len({id(p) for key in names for p in model.get_submodule(key).parameters()})

    several = any(len(stacks[key]) > 1 for key in inner)
    return bool(inner) and (several or count(inner) != count([name]))


class _Block:
    """The called parts of a block, by their names in the block and in the order of their calls."""

    def __init__(self, model: nn.Module, found: Trace, name: str) -> None:
        self.name, self.call = name, found.calls[name]
        modules = dict(walk(model.get_submodule(name)))
        self.calls = {
            key.removeprefix(f"{name}."): call
            for key, call in found.calls.items()
            if key.startswith(f"{name}.")
        }
        self.modules = {key: modules[key] for key in self.calls}
        self.linears = {k: w for k, m in self.modules.items() if (w := width(m)) is not None}
        self.attentions = list(self._attentions())

    def _attentions(self) -> Iterator[str]:
        """The outermost modules that attend and project, and that do not wrap the whole block. One
        that chooses is the router of experts with what it chooses from.
        """
        able = [
            key for key, call in self.calls.items()
            if call.attends and not call.chooses and _inside(key, self.linears)
        ]  # fmt: skip
        found: list[str] = []
        for key in able:
            all_of_it = len(_inside(key, self.linears)) == len(self.linears)
            if not _within(key, found) and not (all_of_it and _inside(key, able)):
                found.append(key)
                yield key

    def mlp(self) -> list[str]:
        """The linear layers outside attentions, those after the last attention if there are any."""
        outside = [key for key in self.linears if not _within(key, self.attentions)]
        order = list(self.calls)
        end = max(order.index(key) for key in self.attentions)
        return [key for key in outside if order.index(key) > end] or outside

    def chooses(self) -> bool:
        """True if something chooses beside the attentions, as the router of experts does."""
        return any(
            call.chooses and not _inside(key, self.attentions) for key, call in self.calls.items()
        )

    def crosses(self, attention: str) -> bool:
        """True if keys and values of an attention come from another sequence than the block's: two
        of its linear layers take a tensor that the block was given beside its hidden states.
        """
        beside = self.call.inputs[1:]
        given = [self.calls[key].inputs[0] for key in _inside(attention, self.linears)]
        return sum(any(x is other for other in beside) for x in given) > 1

    def norm_that_returned(self, tensor: Any) -> str | None:
        """The part whose parameters are vectors and whose output is that very tensor."""
        for key, call in self.calls.items():
            own = [p for _, m in walk(self.modules[key]) for p in m.parameters(recurse=False)]
            vectors = own and all(p.dim() == 1 for p in own)
            if vectors and len(call.inputs) == 1 and any(y is tensor for y in call.outputs):
                return key
        return None


def _inside(outer: str, names: Any) -> list[str]:
    return [name for name in names if name.startswith(f"{outer}.")]


def _within(name: str, outers: Sequence[str]) -> bool:
    return any(name == outer or name.startswith(f"{outer}.") for outer in outers)


def _sites_of(block: _Block, placement: str) -> dict[str, Site]:
    name, mlp = block.name, block.mlp()
    if block.chooses():
        raise ValueError(f"model: expected one MLP in {name}, got experts")
    if not mlp:  # experts hold their weights in no linear layer
        raise ValueError(f"model: expected an MLP of linear layers after the attention of {name}")
    first, last = mlp[0], mlp[-1]
    size = block.linears[last]
    hidden = block.call.outputs[0] if block.call.outputs else None
    if hidden is None or hidden.shape[-1] != size:
        shape = None if hidden is None else tuple(hidden.shape)
        raise ValueError(f"model: expected an output of width {size} of {name}, got {shape}")
    layer, linear = f"{name}.{last}", f"{name}.{last}"
    norm = block.norm_that_returned(hidden)
    if placement == "adapter_plus" or (placement == "hub_seq_bn" and norm is None):
        return {name: Site(size, linear, name)}
    if placement == "hub_seq_bn":
        return {f"{name}.{norm}": Site(size, linear, name, before=True)}
    if placement in ("par_bn", "hub_par_bn"):
        source, given = first, block.calls[first].inputs
        if given[0].shape[-1] != size:
            raise ValueError(f"model: expected an MLP as wide as its input in {name}")
        if placement == "hub_par_bn" and norm is None:
            source = block.norm_that_returned(given[0]) or ""
            if not source:
                raise ValueError(f"model: expected a norm before the MLP of {name}, got none")
        return {layer: Site(size, linear, name, source=f"{name}.{source}")}
    ends: dict[str, Site] = {}
    if placement in ("double_seq_bn", "hub_double_seq_bn"):
        for prefix in block.attentions:
            cross = block.crosses(prefix)
            if cross and placement == "hub_double_seq_bn":
                continue
            own = [key for key in _inside(prefix, block.linears) if block.linears[key] == size]
            if not own:
                raise ValueError(f"model: expected an output of width {size} in {name}.{prefix}")
            key = f"{name}.{own[-1]}"
            ends[key] = Site(size, key, name, attention=True, cross=cross)
    return {**ends, layer: Site(size, linear, name)}
