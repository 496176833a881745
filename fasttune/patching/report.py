"""report and explain: what was fused, what not, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from torch import nn

from fasttune.patching import engine, groups, state

_TITLES = {
    "lora": "LoRA layers",
    "lowrank": "VeRA, AdaLoRA, DeLoRA layers",
    "experts": "LoRA on experts",
    "ia3": "(IA)^3 layers",
    "tokens": "trainable tokens",
    "prefix": "prefix encoders",
    "loss": "causal LM loss",
    "norm": "norms",
    "mlp": "gated MLPs",
    "activation": "activations",
    "attention": "attention (rotary embedding)",
}


@dataclass(frozen=True)
class KindReport:
    """Counts of one kind.

    Attributes:
        kind: "lora", "lowrank", "experts", "ia3", "tokens", "prefix", "loss", "norm", "mlp",
            "activation" or "attention".
        fused: modules whose calls so far were fused.
        pending: patched modules that have not been called yet.
        original: modules, patched or not, that took the original path, by reason.
    """

    kind: str
    fused: int
    pending: int
    original: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What :func:`fasttune.patch` did to a model; ``str()`` is a table."""

    kinds: tuple[KindReport, ...]

    def __getitem__(self, kind: str) -> KindReport:
        for entry in self.kinds:
            if entry.kind == kind:
                return entry
        raise KeyError(kind)

    def __str__(self) -> str:
        table = Table("kind", "fused", "pending", "original", "reason", title="fasttune report")
        for entry in self.kinds:
            table.add_row(
                _TITLES.get(entry.kind, entry.kind),
                str(entry.fused),
                str(entry.pending),
                str(sum(entry.original.values())),
                "\n".join(
                    f"{count} x {reason}" for reason, count in sorted(entry.original.items())
                ),
            )
        return render(table)


@dataclass(frozen=True)
class LayerExplanation:
    """One module of a patched model.

    Attributes:
        name: qualified name.
        kind: as in :class:`KindReport`.
        path: "fused", "original", "mixed", "pending", or "skipped" (never patched).
        backend: backend of the last fused call, "" before it.
        fused_calls: number of fused calls so far.
        fallbacks: calls on the original path, by reason.
        saved_bytes: saved for backward by the last fused call, parameters excluded; of a group, by
            the one that was called first; not counted (0) for experts and trainable tokens.
        group: the modules that are computed together with this one, itself included.
    """

    name: str
    kind: str
    path: str
    backend: str = ""
    fused_calls: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    saved_bytes: int = 0
    group: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """Every module that fasttune looked at; ``str()`` is a table."""

    layers: tuple[LayerExplanation, ...]

    def __getitem__(self, name: str) -> LayerExplanation:
        for layer in self.layers:
            if layer.name == name or layer.name.endswith(f".{name}"):
                return layer
        raise KeyError(name)

    def __str__(self) -> str:
        table = Table("module", "kind", "path", "backend", "calls", "saved", "computed with", "why")
        for layer in self.layers:
            table.add_row(
                layer.name,
                layer.kind,
                layer.path,
                layer.backend,
                str(layer.fused_calls),
                f"{layer.saved_bytes / 2**20:.2f} MiB",
                ", ".join(_short(other) for other in layer.group if other != layer.name),
                "\n".join(
                    f"{count} x {reason}" for reason, count in sorted(layer.fallbacks.items())
                ),
            )
        return render(table)


def report(model: nn.Module) -> Report:
    """Per kind: modules fused, pending (not called yet) and on the original path, with reasons."""
    entries = []
    for kind in engine.KINDS:
        layers = [layer for layer in explain(model).layers if layer.kind == kind]
        original: Counter[str] = Counter()
        for layer in layers:
            if layer.path in ("original", "mixed", "skipped"):
                original.update(next(iter(layer.fallbacks), "") for _ in range(1))
        fused = sum(layer.path == "fused" for layer in layers)
        pending = sum(layer.path == "pending" for layer in layers)
        entries.append(KindReport(kind, fused, pending, dict(original)))
    return Report(tuple(entries))


def explain(model: nn.Module) -> Explanation:
    """Per module: path, backend, calls, fallbacks so far with their reasons, and bytes saved."""
    layers = []
    names = {module: name for name, module in model.named_modules()}
    for name, module in model.named_modules():
        for record in state.all_of(module).values():
            unexpected = {reason: record.fallbacks[reason] for reason in sorted(record.unexpected)}
            layers.append(
                LayerExplanation(
                    name or record.name,
                    record.kind,
                    record.path,
                    record.backend,
                    record.fused_calls,
                    {**unexpected, **record.fallbacks},
                    record.saved_bytes,
                    _group_of(module, names),
                )
            )
    for (kind, name), reason in engine.skipped_of(model).items():
        layers.append(
            LayerExplanation(name or type(model).__name__, kind, "skipped", fallbacks={reason: 1})
        )
    return Explanation(tuple(layers))


def _group_of(module: nn.Module, names: dict[nn.Module, str]) -> tuple[str, ...]:
    members = groups.members_of(module)
    return tuple(sorted(names[member] for member in members if member in names))


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def render(table: Table) -> str:
    """A rich table as plain text, wide enough that nothing is cut."""
    console = Console(width=160, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
