"""Modules on fasttune's ops, for models that are written with them; parameters keep the names of
the modules that they replace."""

from fasttune.nn.bottleneck import BottleneckAdapter
from fasttune.nn.conv_adapter import ConvAdapter
from fasttune.nn.lora import LoraLinear
from fasttune.nn.loss import LinearCrossEntropyLoss
from fasttune.nn.mlp import MLP, GatedMLP
from fasttune.nn.multiple_choice import MultipleChoiceLoss
from fasttune.nn.norms import LayerNorm, RMSNorm
from fasttune.nn.reft import LoReft

__all__ = [
    "MLP",
    "BottleneckAdapter",
    "ConvAdapter",
    "GatedMLP",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "LoReft",
    "LoraLinear",
    "MultipleChoiceLoss",
    "RMSNorm",
]
