"""These tests need triton, but no GPU. Run them with `pytest`, not `python -m pytest`."""

from collections.abc import Iterator

import pytest
import torch

try:
    import triton.language  # noqa: F401
except ImportError:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def nan_filled_allocations() -> Iterator[None]:
    """Every `torch.empty` starts as NaN, so that an element nobody writes shows."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(previous)
