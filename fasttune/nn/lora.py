"""LoraLinear: a frozen linear with one LoRA branch, computed by one op."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fasttune.ops import LoraBranch, LoraProjection, lora_linear_group
from fasttune.ops._dropout import threshold


class LoraLinear(nn.Module):
    """y = x W^T + bias + scaling dropout(x) A^T B^T, with W and bias frozen.

    The state_dict keys are those of ``peft.tuners.lora.layer.Linear`` (PEFT 0.21):
    ``base_layer.weight`` [N, K], ``base_layer.bias`` [N], ``lora_A.<adapter>.weight`` [R, K] and
    ``lora_B.<adapter>.weight`` [N, R]; so is the initialisation (A uniform, B zero).

    Args:
        in_features: K.
        out_features: N.
        r: rank R.
        lora_alpha: scaling is lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``.
        lora_dropout: probability in [0, 1) to drop an element of the branch's input in training.
        use_rslora: rank-stabilised scaling (Kalajdzievski, 2023).
        bias: whether the base has one.
        adapter_name: the key of the branch.
        device, dtype: of all parameters.

    Raises:
        ValueError: r is below 1, or lora_dropout outside [0, 1).

    Source: LoRA (Hu et al., 2021).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int = 8,
        lora_alpha: float = 8.0,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        bias: bool = True,
        adapter_name: str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"r: expected a rank of at least 1, got {r}")
        threshold(lora_dropout)  # raises for a probability that it cannot represent
        self.adapter_name, self.lora_dropout = adapter_name, lora_dropout
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.base_layer = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.base_layer.requires_grad_(False)
        down = nn.Linear(in_features, r, bias=False, device=device, dtype=dtype)
        up = nn.Linear(r, out_features, bias=False, device=device, dtype=dtype)
        self.lora_A = nn.ModuleDict({adapter_name: down})
        self.lora_B = nn.ModuleDict({adapter_name: up})
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """A uniform as nn.Linear's weight, B zero: the branch starts as nothing."""
        nn.init.kaiming_uniform_(self._factor("lora_A"), a=math.sqrt(5))
        nn.init.zeros_(self._factor("lora_B"))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int = 8,
        lora_alpha: float = 8.0,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_name: str = "default",
    ) -> LoraLinear:
        """A LoraLinear around an existing linear, whose parameters become its frozen base.

        Raises:
            TypeError: ``linear`` is no nn.Linear.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
        layer = cls(
            linear.in_features,
            linear.out_features,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            bias=linear.bias is not None,
            adapter_name=adapter_name,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        layer.base_layer = linear.requires_grad_(False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x [*, K] to [*, N]; dtypes and errors as :func:`fasttune.ops.lora_linear_group`."""
        branch = LoraBranch(
            self._factor("lora_A"),
            self._factor("lora_B"),
            self.scaling,
            None,
            self.lora_dropout if self.training else 0.0,
        )
        base = LoraProjection(self.base_layer.weight, self.base_layer.bias, (branch,))
        return lora_linear_group(x, [base])[0]

    def merged(self) -> nn.Linear:
        """A plain linear of the base and the branch together; this module is left as it is."""
        base = self.base_layer
        linear = nn.Linear(
            base.in_features,
            base.out_features,
            base.bias is not None,
            device=base.weight.device,
            dtype=base.weight.dtype,
        )
        with torch.no_grad():
            delta = self._factor("lora_B").float() @ self._factor("lora_A").float()
            linear.weight.copy_(base.weight.float() + self.scaling * delta)
            if base.bias is not None:
                linear.bias.copy_(base.bias)
        return linear

    def extra_repr(self) -> str:
        return f"scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}"

    def _factor(self, name: str) -> Tensor:
        factor: nn.Module = getattr(self, name)[self.adapter_name]
        return factor.get_parameter("weight")
