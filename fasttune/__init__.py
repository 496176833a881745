"""fasttune: faster, smaller parameter-efficient fine-tuning with one line, numerically proven."""

from fasttune._registry import BackendError, use_backend
from fasttune.errors import PatchError, VerificationError
from fasttune.patching import patch, unpatch

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "PatchError",
    "VerificationError",
    "patch",
    "unpatch",
    "use_backend",
]
