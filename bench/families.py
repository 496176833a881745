"""The dimensions of the models that the suites measure, from their published configurations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A causal language model's sizes; ``kv`` is key-value heads times head dimension."""

    name: str
    hidden: int
    intermediate: int
    kv: int
    vocabulary: int

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in_features, out_features) of q and o, gate and up, down, k and v."""
        return (
            (self.hidden, self.hidden),
            (self.hidden, self.intermediate),
            (self.intermediate, self.hidden),
            (self.hidden, self.kv),
        )


SMOLLM2 = Family("SmolLM2-135M", 576, 1536, 192, 49152)
LLAMA3 = Family("Llama-3-8B", 4096, 14336, 1024, 128256)
QWEN2 = Family("Qwen2.5-7B", 3584, 18944, 512, 152064)
