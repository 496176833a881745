"""Many architectures with LoRA on every linear layer: fused where they have the structure, never
wrong (steps_compared.py states the bar).
"""

from __future__ import annotations

import pytest
import torch
from steps_compared import assert_close, exact_copy, in_double, loss_of, step
from tiny_models import with_lora

import fasttune
from fasttune.testing.families import FAMILIES, Family


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_family_is_fused_and_equals_stock(family: Family, dtype: torch.dtype) -> None:
    model = with_lora(family.build(dtype)).train()
    batch = family.batch(dtype)
    keys = list(model.state_dict())
    truth = step(exact_copy(model), in_double(batch))
    stock = step(model, batch)
    with torch.no_grad():
        before = model.eval()(**batch)
    fasttune.patch(model.train())
    ours = step(model, batch)
    assert_close(ours, stock, truth, dtype)
    assert list(model.state_dict()) == keys
    report = fasttune.report(model)
    expected = {"lora", *family.fused}
    assert {kind for kind in expected if report[kind].fused == 0} == set(), str(report)
    fasttune.unpatch(model)
    with torch.no_grad():
        after = model.eval()(**batch)
    assert torch.equal(loss_of(before), loss_of(after))
    assert not fasttune.is_patched(model)
    assert not any("_fasttune" in name for m in model.modules() for name in m.__dict__)
