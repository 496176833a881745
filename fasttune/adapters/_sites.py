"""Where a model takes bottleneck adapters: found by the structure of its repeated blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from fasttune.adapters._bank import AdapterBank

PLACEMENTS = ("seq_bn", "double_seq_bn", "par_bn", "adapter_plus")


@dataclass(frozen=True)
class Site:
    """A linear layer, or a block, whose output an adapter is added to.

    Attributes:
        width: of the output.
        linear: the linear layer whose dtype and device the adapter has.
        source: the layer whose input the adapter takes; None: the output of this one.
    """

    width: int
    linear: str
    source: str | None = None


def find(model: nn.Module, placement: str) -> dict[str, Site]:
    """By name, the layers whose output an adapter is added to.

    ``seq_bn``: the last linear layer of every block, its MLP's output (Pfeiffer et al., 2020);
    ``double_seq_bn``: the last one of every attention too (Houlsby et al., 2019); ``par_bn``: the
    last one of every block, with the input of the first one of its MLP (He et al., 2022);
    ``adapter_plus``: the block itself, after its last residual (Steitz and Roth, 2024).

    Raises:
        ValueError: there is no such placement, or the structure is not recognised.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement: expected one of {', '.join(PLACEMENTS)}, got {placement!r}")
    sites: dict[str, Site] = {}
    for name, block in _blocks(model):
        sites.update(_sites_of(name, block, placement))
    if not sites:
        raise ValueError(
            "model: expected a ModuleList of layers of one class, each with an attention and an "
            f"MLP of linear layers, got none in {type(model).__name__}"
        )
    return sites


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    for name, stack in _walk(model):
        if not isinstance(stack, nn.ModuleList) or len({type(block) for block in stack}) != 1:
            continue
        if any(name.startswith(outer + ".") for outer, _ in found):
            continue  # inside a block
        members = [(f"{name}.{i}", block) for i, block in enumerate(stack)]
        if all(_attentions(block) and _linears(block) for _, block in members):
            found += members
    return found


def _sites_of(name: str, block: nn.Module, placement: str) -> dict[str, Site]:
    attentions, linears = _attentions(block), _linears(block)
    last = next(reversed(linears))
    inside = tuple(f"{prefix}." for prefix in attentions)
    width = linears[last]
    if last.startswith(inside):  # experts hold their weights in no linear layer
        raise ValueError(f"model: expected an MLP of linear layers after the attention of {name}")
    if any(isinstance(module, nn.ModuleList) and _is_experts(module) for _, module in _walk(block)):
        raise ValueError(f"model: expected one MLP in {name}, got experts")
    if placement == "adapter_plus":
        return {name: Site(width, f"{name}.{last}")}
    if placement == "par_bn":
        first = next(key for key in linears if not key.startswith(inside))
        layer = base(block.get_submodule(first))
        if layer.weight.shape[int(isinstance(layer, nn.Linear))] != width:
            raise ValueError(f"model: expected an MLP as wide as its input in {name}")
        return {f"{name}.{last}": Site(width, f"{name}.{last}", f"{name}.{first}")}
    chosen = []
    if placement == "double_seq_bn":
        for prefix, attention in attentions.items():
            # A fused projection of queries, keys and values may be defined last; it is wider.
            own = [key for key, size in _linears(attention).items() if size == width]
            if not own:
                raise ValueError(f"model: expected an output of width {width} in {name}.{prefix}")
            chosen.append(f"{prefix}.{own[-1]}")
    chosen.append(last)
    return {f"{name}.{key}": Site(width, f"{name}.{key}") for key in chosen}


def _is_experts(modules: nn.ModuleList) -> bool:
    same = len(modules) > 1 and len({type(module) for module in modules}) == 1
    return same and not any(_attentions(module) for module in modules)


def _attentions(block: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules of ``block`` whose class says that they attend and that project."""
    found: dict[str, nn.Module] = {}
    for name, module in _walk(block):
        nested = any(name.startswith(outer + ".") for outer in found)
        if name and not nested and "Attention" in type(module).__name__ and _linears(module):
            found[name] = module
    return found


def _linears(block: nn.Module) -> dict[str, int]:
    """Linear layers of ``block`` by name in order of definition, with their output widths."""
    return {name: width for name, module in _walk(block) if (width := _width(module)) is not None}


def _walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """named_modules without what was added to the model: adapters, and what PEFT wraps."""
    yield prefix, module
    if is_wrapper(module):
        return
    for name, child in module.named_children():
        if not isinstance(child, AdapterBank):
            yield from _walk(child, f"{prefix}.{name}" if prefix else name)


def is_wrapper(module: nn.Module) -> bool:
    """True for a layer around another one, as PEFT's tuners are: one site, the outer layer."""
    return isinstance(getattr(module, "base_layer", None), nn.Module)


def base(module: Any) -> Any:
    """The innermost layer of a wrapper, or the layer itself."""
    while is_wrapper(module):
        module = module.base_layer
    return module


def _width(module: Any) -> int | None:
    module = base(module)
    if isinstance(module, nn.Linear):
        return module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return int(module.nf)
    return None
