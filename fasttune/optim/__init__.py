"""AdamW with decoupled weight decay, and what fine-tuning needs around it."""

from fasttune.optim.adamw import AdamW, TensorNorms
from fasttune.optim.fuse import fuse_into_backward
from fasttune.optim.layerwise import layerwise_lr_groups
from fasttune.optim.trainer import trainer_args

__all__ = ["AdamW", "TensorNorms", "fuse_into_backward", "layerwise_lr_groups", "trainer_args"]
