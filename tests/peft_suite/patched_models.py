"""A pytest plugin for PEFT's own test suite: every PEFT model is patched right after creation.

Loaded with ``-p patched_models`` by tests/integrations/test_peft_suite.py.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import peft

import fasttune
from fasttune.ops import policy

logging.getLogger("fasttune").setLevel(logging.ERROR)  # most of these models have nothing to patch
policy.limits = policy.NO_LIMITS  # all of them are tiny


def patched_after(method: Any) -> Any:
    """The method, and then ``fasttune.patch`` of the model."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        fasttune.patch(self)
        return result

    return wrapper


for model_class in (peft.PeftModel, peft.PeftMixedModel):
    model_class.__init__ = patched_after(model_class.__init__)
    model_class.add_adapter = patched_after(model_class.add_adapter)
