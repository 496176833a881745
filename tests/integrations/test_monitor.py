"""What the monitor makes of the norms of a step and of the losses."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest

from fasttune.integrations.monitor import Monitor
from fasttune.optim import TensorNorms


def optimizer(**gradients: float) -> Any:
    """Stands for one whose last step had these gradient norms; updates of 0.1 to weights of 2."""
    norms = {name: TensorNorms(norm, 0.1, 2.0) for name, norm in gradients.items()}
    return SimpleNamespace(optimizer=SimpleNamespace(monitor=lambda: norms))  # as accelerate wraps


def test_a_log_has_the_extremes_of_the_step() -> None:
    monitor = Monitor()
    assert monitor.measure(optimizer(a=0.02, b=0.05, c=0.03), {"loss": 1.5}) == {
        "fasttune/gradient_norm_max": 0.05,
        "fasttune/gradient_norm_min": 0.02,
        "fasttune/update_ratio_max": pytest.approx(0.05),
    }
    assert set(monitor.last) == {"a", "b", "c"}
    assert monitor.measure(optimizer(), {"loss": 1.5}) == {}  # a skipped step
    assert monitor.measure(optimizer(a=0.02), {"learning_rate": 1.0}) == {}


def test_the_largest_update_ratio_is_logged_and_weights_of_zero_have_none() -> None:
    norms = {
        "zero": TensorNorms(0.01, 5.0, 0.0),
        "large": TensorNorms(0.01, 0.5, 2.0),
        "small": TensorNorms(0.01, 0.1, 2.0),
    }
    made = SimpleNamespace(monitor=lambda: norms)
    assert Monitor().measure(made, {"loss": 1.0})["fasttune/update_ratio_max"] == 0.25


def test_the_gap_is_evaluation_minus_training_loss(caplog: pytest.LogCaptureFixture) -> None:
    monitor = Monitor(gap=0.2)
    with caplog.at_level(logging.WARNING, logger="fasttune"):
        assert monitor.measure(optimizer(a=0.01), {"eval_loss": 9.0}) == {}  # nothing to compare
        monitor.measure(optimizer(a=0.01), {"loss": 1.0})
        low = monitor.measure(optimizer(a=0.01), {"eval_loss": 1.15})
        assert low == {"fasttune/loss_gap": pytest.approx(0.15)} and not caplog.text
        for _ in range(2):
            monitor.measure(optimizer(a=0.01), {"eval_loss": 1.25})
    assert caplog.text.count("evaluation loss is 0.25 above training loss") == 1  # once a run


@pytest.mark.parametrize(
    ("gradients", "messages"),
    [
        ({"a": 1e-3, "b": 1e-1}, []),
        ({"a": 0.01, "b": 0.2}, ["gradient norm 0.2 of b ("]),
        ({"a": math.nan}, ["gradient norm nan of a ("]),
        ({"a": 1e-4, "b": 1e-5, "c": 0.01}, ["1e-05 of b (2 of 3 tensors below 0.001)"]),
        ({"a": 1e-4, "b": 0.2}, ["0.2 of b (", "0.0001 of a (1 of 2 tensors below 0.001)"]),
    ],
)
def test_norms_outside_the_range_are_named(
    caplog: pytest.LogCaptureFixture, gradients: dict[str, float], messages: list[str]
) -> None:
    with caplog.at_level(logging.WARNING, logger="fasttune"):
        Monitor().measure(optimizer(**gradients), {"loss": 1.0})
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == len(messages)
    assert all(part in text for part, text in zip(messages, found, strict=True))
