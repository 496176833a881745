"""LoReft: edits hidden states within a learned low-rank subspace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasttune.nn._orthonormal import Orthonormal, original_of, orthonormal_rows
from fasttune.ops import reft
from fasttune.ops._dropout import threshold
from fasttune.ops.reft import REFT_ACTIVATIONS

# By name: are the rows of R orthonormal, and is R h subtracted?
VARIANTS = {
    "loreft": (True, True),
    "direft": (True, False),
    "noreft": (False, True),
    "nodireft": (False, False),
}
# Other names of transformers.
_ALIASES = {
    "linear": "identity", "swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"
}  # fmt: skip

# Of a rotation in a checkpoint, in its own dtype: bf16 keeps 8 bits of each element.
_ORTHONORMAL_WITHIN = 0.05


class LoReft(nn.Module):
    """y = h + R^T (act(W h + b) - R h) in chosen rows, a ReFT intervention.

    The parameters have pyreft's names: ``learned_source.weight`` W [R, H], ``learned_source.bias``
    [R], and ``rotate_layer`` with ``weight`` R^T [H, R], whose parameter is
    ``rotate_layer.parametrizations.weight.original`` [H, R]; without the constraint
    ``proj_layer.weight`` [R, H]. They start as pyreft's do: R from a random orthogonal matrix, W
    and b as those of a linear layer, so that a fresh intervention is no identity.

    R is orthogonalised once for each value of its parameter (once a step), however often the module
    runs, and its gradient goes through the orthogonalisation once a backward.

    Args:
        hidden_size: H.
        rank: R, from 1 to H.
        variant: "loreft"; "direft" drops - R h; "noreft" drops the constraint that the rows of R
            are orthonormal; "nodireft" drops both, which is what the paper calls DiReFT. The names
            are pyreft's.
        activation: silu (swish), gelu, gelu_tanh (gelu_new), quick_gelu, relu, relu2, tanh,
            sigmoid, leaky_relu or identity (linear).
        dropout: probability in [0, 1) to drop an element of the edited rows in training.
        device: of the parameters.
        dtype: of W and b, and of R where it is not constrained (that one is fp32); None: fp32.

    Raises:
        ValueError: sizes out of range, an unknown variant or activation, or a dropout outside
            [0, 1).

    ``load_state_dict`` reads the three forms in which such a module is found: its own, that of
    torch's parametrisation (with ``rotate_layer.parametrizations.weight.0.base``), and the short
    one that pyreft saves (``weight``, ``bias``, ``rotate_layer``), which
    :meth:`pyreft_state_dict` writes.

    Source: Wu et al. (2024), ReFT: Representation Finetuning for Language Models;
    interventions.py of pyreft.
    """

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        *,
        variant: str = "loreft",
        activation: str = "identity",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= hidden_size:
            raise ValueError(f"rank: expected 1 to {hidden_size}, got {rank}")
        if variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
        known = _ALIASES.get(activation, activation)
        if known not in REFT_ACTIVATIONS:
            names = ", ".join((*REFT_ACTIVATIONS, *_ALIASES))
            raise ValueError(f"activation: expected one of {names}, got {activation!r}")
        threshold(dropout)  # raises for a probability that it cannot represent
        self.variant, self.activation, self.dropout = variant, known, dropout
        self.orthonormal, self.difference = VARIANTS[variant]
        dtype = torch.float32 if dtype is None else dtype
        if self.orthonormal:
            self.rotate_layer = Orthonormal(hidden_size, rank, device=device)
        else:
            self.proj_layer = nn.Linear(hidden_size, rank, bias=False, device=device, dtype=dtype)
        self.learned_source = nn.Linear(hidden_size, rank, device=device, dtype=dtype)

    @property
    def rotation(self) -> Tensor:
        """R [R, H]."""
        return self.rotate_layer.rows() if self.orthonormal else self.proj_layer.weight

    def forward(self, h: Tensor, rows: Tensor | None = None, *, inplace: bool = False) -> Tensor:
        """h [*, H] to [*, H], edited in the ``rows`` [P] of h as [M, H]; None: in all.

        ``rows`` and ``inplace`` as in :func:`fasttune.ops.reft`.
        """
        return reft(
            h, self.rotation, self.learned_source.weight, self.learned_source.bias, rows=rows,
            difference=self.difference, activation=self.activation,
            dropout_p=self.dropout if self.training else 0.0, inplace=inplace,
        )  # fmt: skip

    def pyreft_state_dict(self) -> dict[str, Tensor]:
        """What pyreft's module of this variant saves and loads."""
        source = {key: value.detach() for key, value in self.learned_source.named_parameters()}
        if self.variant == "loreft":
            return {**source, "rotate_layer": self.rotation.detach().t().contiguous()}
        named = {f"learned_source.{key}": value for key, value in source.items()}
        if not self.orthonormal:
            return {**named, "proj_layer.weight": self.proj_layer.weight.detach()}
        # pyreft has torch's parametrisation with its base here: of minus the identity it is the
        # first columns of the base.
        rotation = self.rotation.detach().t()
        base = torch.linalg.qr(rotation, mode="complete").Q
        base[:, : rotation.shape[1]] = rotation
        original = torch.zeros_like(rotation)
        original.diagonal().fill_(-1.0)
        name = "rotate_layer.parametrizations.weight"
        return {**named, f"{name}.0.base": base, f"{name}.original": original}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        for key in ("weight", "bias"):
            if prefix + key in state_dict:
                state_dict[f"{prefix}learned_source.{key}"] = state_dict.pop(prefix + key)
        name = f"{prefix}rotate_layer.parametrizations.weight"
        weight = state_dict.pop(f"{prefix}rotate_layer", None)
        base = state_dict.pop(f"{name}.0.base", None)
        if weight is None and base is not None:
            weight = base @ orthonormal_rows(state_dict[f"{name}.original"]).t()
        if weight is not None:
            gram = weight.t().float() @ weight.float()
            error = float((gram - torch.eye(len(gram), device=gram.device)).abs().max())
            if not error < _ORTHONORMAL_WITHIN:
                error_msgs.append(
                    f"{prefix}rotate_layer: expected orthonormal columns, got ones whose products "
                    f"are {error:.2g} off"
                )
            state_dict[f"{name}.original"] = original_of(weight)
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return f"variant={self.variant}, activation={self.activation}, dropout={self.dropout}"
