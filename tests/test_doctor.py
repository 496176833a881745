"""What ``fasttune doctor`` says of backends."""

from __future__ import annotations

import pytest

from fasttune import _native, doctor


def test_every_op_on_the_cpu_names_its_backend_and_why_the_others_do_not() -> None:
    rows = {name: (served, others) for name, served, others in doctor.backends("cpu")}
    served, others = rows["glu_fwd"]
    assert served == "cpu"
    assert others["cuda"] == "it takes CUDA tensors"
    assert rows["rope_fwd"][1]["cuda"] == "it is not implemented"
    assert "glu_fwd" in doctor.render_report()


def test_triton_comes_before_cuda_and_cuda_before_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_native, "cuda_missing", lambda: None)
    monkeypatch.setattr(doctor._triton, "why_not", lambda tensors: None)
    served, others = {row[0]: row[1:] for row in doctor.backends("cuda")}["rms_norm_fwd"]
    assert served == "triton"
    assert others["cuda"] is None
    monkeypatch.setattr(doctor._triton, "why_not", lambda tensors: "triton is not installed")
    rows = {row[0]: row[1] for row in doctor.backends("cuda")}
    assert rows["rms_norm_fwd"] == "cuda"
    assert rows["rope_fwd"] == "reference"


def test_a_build_without_nvcc_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "fasttune was built without nvcc"
    monkeypatch.setattr(_native, "cuda_not_built", lambda: reason)
    assert doctor.hardware()["CUDA C++ kernels"] == reason
