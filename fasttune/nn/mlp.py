"""The two feed-forward blocks of transformers, with one kernel between their products.

The projections are modules and are called as modules: what replaces or wraps one (LoRA,
quantisation, hooks) keeps working.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasttune.ops._activations import check_activation
from fasttune.ops.bias_activation import bias_activation
from fasttune.ops.glu import glu


class GatedMLP(nn.Module):
    """down_proj(act(gate_proj(x)) * up_proj(x)), [*, hidden_size] to [*, hidden_size].

    Args:
        hidden_size: features of input and output.
        intermediate_size: features between.
        activation: silu, gelu, gelu_tanh, quick_gelu, relu, relu2, tanh or sigmoid.
        bias: whether each of the three projections has one.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: ``activation`` names none.

    The keys of ``state_dict`` and the semantics are those of
    ``transformers.models.llama.modeling_llama.LlamaMLP`` (5.24).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu",
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_activation(activation)
        super().__init__()
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.activation = activation
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, **options)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, **options)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = glu(self.gate_proj(x), self.up_proj(x), activation=self.activation)
        out: Tensor = self.down_proj(y)
        return out

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class MLP(nn.Module):
    """fc2(act(fc1(x))), [*, hidden_size] to [*, hidden_size].

    Args:
        hidden_size: features of input and output.
        intermediate_size: features between.
        activation: as for :class:`GatedMLP`.
        bias: whether each of the two projections has one.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: ``activation`` names none.

    The keys of ``state_dict`` and the semantics are those of
    ``transformers.models.phi.modeling_phi.PhiMLP`` (5.24).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "gelu_tanh",
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_activation(activation)
        super().__init__()
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.activation = activation
        self.fc1 = nn.Linear(hidden_size, intermediate_size, **options)
        self.fc2 = nn.Linear(intermediate_size, hidden_size, **options)

    def forward(self, x: Tensor) -> Tensor:
        # The product adds fc1's bias itself, at no cost; taking it apart would bypass fc1's hooks.
        out: Tensor = self.fc2(bias_activation(self.fc1(x), activation=self.activation))
        return out

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
