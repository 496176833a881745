"""Fails loudly when a private name of a neighbour that fasttune reads has moved."""

from __future__ import annotations

import inspect

import torch
from tiny_models import tiny_llama, with_lora
from torch.nn.modules import module as torch_module

from fasttune import _torch


def test_torch() -> None:
    assert callable(torch._C._len_torch_dispatch_stack)
    assert torch._C._current_graph_task_id() == -1
    assert callable(torch._C._functorch.peek_interpreter_stack)
    assert callable(torch._C._autograd._profiler_enabled)
    assert callable(torch_module._has_any_global_hook)
    assert callable(torch.cpu._is_amx_tile_supported)
    assert callable(torch._assert_async)
    for name in ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"):
        assert hasattr(torch.optim.AdamW([torch.zeros(1)]), name)
    seen = []
    torch.vmap(lambda x: (seen.append(_torch.in_functorch()), x)[1])(torch.ones(2))
    assert seen == [True]
    assert not _torch.in_functorch()


def test_what_is_left_for_the_end_of_a_backward_runs_there() -> None:
    events: list[str] = []
    first = torch.ones(2, requires_grad=True)
    middle = first * 2
    middle.register_hook(lambda grad: _torch.after_backward(lambda: events.append("end")))
    first.register_hook(lambda grad: events.append("first"))
    middle.sum().backward()
    assert events == ["first", "end"]


def test_peft_lora_linear() -> None:
    layer = with_lora(tiny_llama()).base_model.model.model.layers[0].self_attn.q_proj
    for name in ("base_layer", "lora_A", "lora_B", "lora_dropout", "scaling", "lora_variant",
                 "active_adapters", "disable_adapters", "merged"):  # fmt: skip
        assert hasattr(layer, name), name
    source = inspect.getsource(type(layer).forward)
    # The lines whose meaning lora_linear reproduces.
    for line in (
        "x = self._cast_input_dtype(x, lora_A.weight.dtype)",
        "result = result + lora_B(lora_A(dropout(x))) * scaling",
        "result = result.to(torch_result_dtype)",
    ):
        assert line in source, line


def test_peft_copies_the_config_to_the_injected_model() -> None:
    model = with_lora(tiny_llama())
    assert list(model.base_model.model.__dict__["peft_config"]) == ["default"]


def test_transformers_loss_function() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss, fixed_cross_entropy

    names = list(inspect.signature(ForCausalLMLoss).parameters)
    expected = "logits labels vocab_size num_items_in_batch ignore_index shift_labels kwargs"
    assert names == expected.split()
    assert "ignore_index=ignore_index, reduction=reduction" in inspect.getsource(
        fixed_cross_entropy
    )
    model = tiny_llama()
    model.loss_function = len
    assert model.__dict__["_loss_function"] is len


def test_trainer_saves_and_loads_checkpoints_by_these_names() -> None:
    from transformers import Trainer

    for name, parameters in {
        "_save": ["self", "output_dir", "state_dict"],
        "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
        "_load_best_model": ["self"],
    }.items():
        assert list(inspect.signature(getattr(Trainer, name)).parameters) == parameters
    assert "self._save(output_dir)" in inspect.getsource(Trainer.save_model)
    assert "self._load_best_model()" in inspect.getsource(Trainer)
    assert "self._load_from_checkpoint(resume_from_checkpoint)" in inspect.getsource(Trainer)
    assert "state.best_model_checkpoint" in inspect.getsource(Trainer._load_best_model)
