"""ConvAdapter: squeeze with a depth-wise convolution, activate, widen point by point, add."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fasttune.nn.bottleneck import Activation, _apply, _checked, _factor
from fasttune.ops._dropout import threshold

Pair = int | tuple[int, int]


class ConvAdapter(nn.Module):
    """y = residual + scale dropout(up(act(down(x)))), a bottleneck of convolutions.

    ``down`` is a convolution of R groups from C to R channels, ``up`` one of 1x1 from R to O. The
    parameters are ``down.weight`` [R, C / R, k, k], ``down.bias`` [R], ``up.weight`` [O, R, 1, 1],
    ``up.bias`` [O] and, where the scale is trained, ``scale`` [1] or [O]. ``up`` starts at zero: a
    fresh adapter adds nothing.

    Args:
        in_channels: C.
        out_channels: O.
        bottleneck_size: R, a divisor of C.
        activation: as of :class:`fasttune.nn.BottleneckAdapter`.
        kernel_size, stride, padding, dilation: of ``down``, as of torch.nn.Conv2d.
        scaling: a float, or a parameter that starts at 1: "scalar" or "channels".
        dropout: probability in [0, 1) to drop an element of the output in training.
        device, dtype: of the parameters.

    Raises:
        ValueError: sizes below 1, an R that does not divide C, an unknown activation or scaling, or
            a dropout outside [0, 1).
        TypeError: an argument of another type.

    Source: Conv-Adapter (Chen et al., 2022), whose reference code starts ``up`` at random.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bottleneck_size: int,
        activation: Activation = "relu",
        *,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        padding: Pair | str = "same",
        dilation: Pair = 1,
        scaling: float | str = "channels",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "bottleneck_size": bottleneck_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if in_channels % bottleneck_size:
            raise ValueError(
                f"bottleneck_size: expected a divisor of {in_channels}, got {bottleneck_size}"
            )
        threshold(dropout)  # raises for a probability that it cannot represent
        self.activation = _checked("activation", activation)
        self.dropout, self.scaling = dropout, _factor(scaling)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Conv2d(
            in_channels, bottleneck_size, kernel_size, stride, padding, dilation,
            groups=bottleneck_size, **kind,
        )  # fmt: skip
        self.up = nn.Conv2d(bottleneck_size, out_channels, 1, **kind)
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)
        scales = {"scalar": 1, "channels": out_channels}.get(str(scaling))
        self.scale = None if scales is None else nn.Parameter(torch.ones(scales, **kind))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [N, C, H, W] to [N, O, H', W'], the shape of ``residual``, which is x if None."""
        u = self.up(_apply(self.activation, self.down(x)))
        if self.dropout and self.training:
            u = functional.dropout(u, self.dropout)
        if self.scale is not None:
            u = u * self.scale.view(-1, 1, 1)
        elif self.scaling != 1.0:
            u = u * self.scaling
        y: Tensor = (x if residual is None else residual) + u
        return y

    def extra_repr(self) -> str:
        name = self.activation if isinstance(self.activation, str) else "callable"
        scaling = self.scaling if self.scale is None else f"{self.scale.numel()} trained"
        return f"activation={name}, scaling={scaling}, dropout={self.dropout}"
