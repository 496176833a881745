"""BottleneckAdapter: squeeze, activate, widen, add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fasttune import _torch
from fasttune.nn.norms import LayerNorm
from fasttune.ops import bottleneck
from fasttune.ops._activations import ACTIVATIONS
from fasttune.ops._dropout import threshold
from fasttune.ops.bottleneck import BOTTLENECK_ACTIVATIONS, compute_dtype
from fasttune.ops.policy import bottleneck_not_faster, bottleneck_too_few

# Other names of transformers and of the adapters library.
_ALIASES = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_SCALINGS = ("scalar", "channels")

Activation = str | Callable[[Tensor], Tensor]


class BottleneckAdapter(nn.Module):
    """y = residual + scale dropout(act(x D^T + b_D) U^T + b_U), a bottleneck adapter.

    The parameters are ``down.weight`` [R, H], ``down.bias`` [R], ``up.weight`` [H, R] and
    ``up.bias`` [H], and with the options ``scale`` [1] or [H], ``norm.weight``, ``norm.bias``,
    ``gate.weight`` [1, H] and ``gate.bias``. ``up`` starts at zero: a fresh adapter adds nothing.

    Args:
        hidden_size: H.
        bottleneck_size: R.
        activation: silu (swish), gelu, gelu_tanh (gelu_new), quick_gelu, relu, relu2, tanh,
            sigmoid, leaky_relu, identity, or any callable.
        scaling: a float, or a parameter that starts at 1: "scalar" or "channels" (AdapterPlus).
        dropout: probability in [0, 1) to drop an element of the output in training.
        bias: whether both products have one.
        layer_norm: normalise the input first, with a norm of the adapter's own.
        output_activation: after the up-projection, a name or a callable; None: none.
        gate: multiply the output by a sigmoid of the input, averaged over the tokens (the second
            dimension to last of x).
        device, dtype: of the parameters.

    Raises:
        ValueError: sizes below 1, an unknown activation or scaling, or a dropout outside [0, 1).
        TypeError: an argument of another type.

    The op :func:`fasttune.ops.bottleneck` computes it where there is something to gain: on a GPU in
    16 bits up to 128 wide, if the parameters have another dtype or the input is large; on a CPU
    with AMX in bf16, and in fp32 for many rows; on other CPUs with dropout, or with a trained scale
    of a large input (fasttune/ops/policy.py). Otherwise, and where ``down`` or
    ``up`` is no plain linear layer any more, it is four or five operations of torch, which run as
    they are.

    Source: Houlsby et al. (2019); Pfeiffer et al. (2020); AdapterPlus (Steitz and Roth, 2024).
    """

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int,
        activation: Activation = "relu",
        *,
        scaling: float | str = 1.0,
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = False,
        output_activation: Activation | None = None,
        gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("bottleneck_size", bottleneck_size)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        threshold(dropout)  # raises for a probability that it cannot represent
        self.activation = _checked("activation", activation)
        self.output_activation = (
            None if output_activation is None else _checked("output_activation", output_activation)
        )
        self.dropout, self.scaling = dropout, _factor(scaling)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Linear(hidden_size, bottleneck_size, bias, **kind)
        self.up = nn.Linear(bottleneck_size, hidden_size, bias, **kind)
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)
        scales = {"scalar": 1, "channels": hidden_size}.get(str(scaling))
        self.scale = None if scales is None else nn.Parameter(torch.ones(scales, **kind))
        self.norm = LayerNorm(hidden_size, **kind) if layer_norm else None
        self.gate = nn.Linear(hidden_size, 1, **kind) if gate else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [*, H] to [*, H]; ``residual`` [*, H] is x if None."""
        residual = x if residual is None else residual
        dropout = self.dropout if self.training else 0.0
        inner = x if self.norm is None else self.norm(x)
        scaled = self.scale is not None
        own = None if bottleneck_too_few(x, dropout, scaled) else self._parameters_of_products()
        if own is not None:
            down, down_bias, up, up_bias = own
            dtype = compute_dtype(x, down, up)
            if not bottleneck_not_faster(x, down, up, dtype, dropout, scaled):
                return bottleneck(
                    inner, down, up, down_bias=down_bias, up_bias=up_bias, residual=residual,
                    activation=str(self.activation),
                    scale=self.scaling if self.scale is None else self.scale, dropout_p=dropout,
                )  # fmt: skip
        u = self.up(_apply(self.activation, self.down(inner)))
        if self.output_activation is not None:
            u = _apply(self.output_activation, u)
        if dropout:
            u = functional.dropout(u, dropout)
        if self.gate is not None:
            u = u * torch.sigmoid(self.gate(x)).mean(dim=-2, keepdim=True)
        if self.scale is not None:
            u = (u * self.scale).to(u.dtype)  # as the op: what is added decides the dtype
        elif self.scaling != 1.0:
            u = u * self.scaling
        y: Tensor = residual + u
        return y

    def _parameters_of_products(self) -> tuple[Any, Any, Any, Any] | None:
        """The weights and biases of ``down`` and ``up``, or None if that is not all they are."""
        if not isinstance(self.activation, str):
            return None
        if self.output_activation is not None or self.gate is not None:
            return None
        modules: Any = self._modules  # a few times faster than attributes
        down, up = modules["down"], modules["up"]
        if not (_is_plain(down) and _is_plain(up)):
            return None
        inner, outer = down._parameters, up._parameters
        return inner["weight"], inner["bias"], outer["weight"], outer["bias"]

    def extra_repr(self) -> str:
        name = self.activation if isinstance(self.activation, str) else "callable"
        scaling = self.scaling if self.scale is None else f"{self.scale.numel()} trained"
        return f"activation={name}, scaling={scaling}, dropout={self.dropout}"


def _is_plain(layer: Any) -> bool:
    """Whether the layer is its weight and bias alone: not quantized, wrapped or hooked."""
    if type(layer) is not nn.Linear or _torch.hooked(layer):
        return False
    weight: Any = layer._parameters.get("weight")
    if weight is None or not _torch.all_plain_or_meta((weight,)):
        return False
    return bool(weight.is_floating_point())


def _checked(name: str, activation: Activation) -> Activation:
    if not isinstance(activation, str):
        if not callable(activation):
            raise TypeError(
                f"{name}: expected a name or a callable, got {type(activation).__name__}"
            )
        return activation
    known = _ALIASES.get(activation, activation)
    if known not in BOTTLENECK_ACTIVATIONS:
        names = ", ".join((*BOTTLENECK_ACTIVATIONS, *_ALIASES))
        raise ValueError(f"{name}: expected one of {names}, got {activation!r}")
    return known


def _factor(scaling: float | str) -> float:
    if isinstance(scaling, str):
        if scaling not in _SCALINGS:
            raise ValueError(f"scaling: expected a number, scalar or channels, got {scaling!r}")
        return 1.0
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling: expected a number or a name, got {type(scaling).__name__}")
    return float(scaling)


def _apply(activation: Activation, z: Tensor) -> Tensor:
    if not isinstance(activation, str):
        return activation(z)
    return z if activation == "identity" else ACTIVATIONS[activation].value(z)
