"""patch, unpatch and what can be asked of a patched model."""

from fasttune.patching.engine import is_patched, patch, unpatch

__all__ = ["is_patched", "patch", "unpatch"]
