"""The buffers that the C++ kernels keep between calls."""

from __future__ import annotations

import mmap
import threading

import pytest
import torch

from fasttune import _native

HUGE_PAGE = 2 << 20


@pytest.fixture(autouse=True)
def no_scratch():
    _native.free_scratch()
    yield
    _native.free_scratch()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 2048])  # less and more than a huge page
def test_a_buffer_has_its_shape_and_is_kept(rows, dtype):
    buffer = _native.scratch("test", rows, 700, dtype)
    buffer.fill_(2.0)
    assert buffer.shape == (rows, 700) and buffer.dtype == dtype and buffer.is_contiguous()
    assert buffer.data_ptr() % 64 == 0
    again = _native.scratch("test", rows // 2, 700, dtype)
    assert again.data_ptr() == buffer.data_ptr() and bool((again == 2.0).all())
    assert _native.scratch("other", rows, 700, dtype).data_ptr() != buffer.data_ptr()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without huge pages")
def test_a_large_buffer_starts_at_a_huge_page():
    assert _native.scratch("test", 1024, 1500).data_ptr() % HUGE_PAGE == 0


@pytest.mark.parametrize("advice", ["missing", "refused"])
def test_without_huge_pages_a_large_buffer_lies_in_small_ones(advice, monkeypatch):
    if advice == "missing":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    else:
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1, raising=False)
    assert _native.scratch("test", 1024, 1500).fill_(1.0).sum() == 1024 * 1500


def test_a_buffer_in_use_outlives_its_release():
    buffer = _native.scratch("test", 1024, 1500).fill_(3.0)
    _native.free_scratch()
    another = _native.scratch("test", 1024, 1500).fill_(4.0)
    assert another.data_ptr() != buffer.data_ptr() and bool((buffer == 3.0).all())


def test_every_thread_has_its_own():
    buffer = _native.scratch("test", 1024, 1500).fill_(3.0)
    others = []
    thread = threading.Thread(target=lambda: others.append(_native.scratch("test", 1024, 1500)))
    thread.start()
    thread.join()
    others[0].fill_(4.0)
    assert others[0].data_ptr() != buffer.data_ptr() and bool((buffer == 3.0).all())
