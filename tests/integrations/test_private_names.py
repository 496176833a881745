"""Fails loudly when a private name of a neighbour that fasttune reads has moved."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_llama, with_lora
from torch import nn
from torch.nn.modules import module as torch_module

from fasttune import _torch


def test_torch() -> None:
    assert callable(torch._C._len_torch_dispatch_stack)
    assert torch._C._current_graph_task_id() == -1
    assert callable(torch._C._functorch.peek_interpreter_stack)
    assert callable(torch._C._autograd._profiler_enabled)
    assert not _torch.any_autocast()
    with torch.autocast("cpu", torch.bfloat16):
        assert _torch.any_autocast()
    with torch.autocast("mps", torch.bfloat16):  # which torch's own answer does not count
        assert _torch.autocast_dtype("mps") == torch.bfloat16
    assert callable(torch_module._has_any_global_hook)
    assert callable(torch.cpu._is_amx_tile_supported)
    assert callable(torch._assert_async)
    for name in ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"):
        assert hasattr(torch.optim.AdamW([torch.zeros(1)]), name)
    seen = []
    torch.vmap(lambda x: (seen.append(_torch.in_functorch()), x)[1])(torch.ones(2))
    assert seen == [True]
    assert not _torch.in_functorch()


def test_fake_tensors_run_and_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with _torch.fake_tensors(_torch.FakeTensorMode(allow_non_fake_inputs=True)):
        assert (torch.empty(2, 3) @ torch.ones(3, 4)).shape == (2, 4)
        with pytest.raises(Exception, match="BF16"):
            torch._grouped_mm(torch.empty(2, 2, 8), torch.empty(2, 8, 8))
    assert "grouped_mm" not in caplog.text


def test_transformers_configurations_choose_implementations() -> None:
    from fasttune.integrations import transformers as integration

    config = tiny_llama().config
    config._attn_implementation = "sdpa"
    copied = integration.eager(config, {})
    assert copied._attn_implementation == "eager" and config._attn_implementation == "sdpa"
    assert copied._experts_implementation == "batched_mm"


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


def test_peft_lora_embedding() -> None:
    model: Any = with_lora(tiny_llama(), target_modules=["embed_tokens"])
    layer = model.base_model.model.model.embed_tokens
    for name in ("base_layer", "lora_embedding_A", "lora_embedding_B", "scaling", "lora_variant",
                 "tp_layer", "active_adapters", "disable_adapters", "merged"):  # fmt: skip
        assert hasattr(layer, name), name
    assert layer._get_embed_scale() is None
    forward, embed = (inspect.getsource(f) for f in (type(layer).forward, type(layer)._embed))
    # The lines whose meaning lora_embedding reproduces.
    for line in (
        "result = self.base_layer(x, *args, **kwargs)",
        "embedding_A = self.lora_embedding_A[active_adapter].T",
        "adapter_output = (after_A @ embedding_B) * scaling",
        "adapter_output = adapter_output * embed_scale.to(adapter_output.dtype)",
        "result = result + adapter_output",
        "result = result.to(torch_result_dtype)",
    ):
        assert line in forward, line
    assert "lora_dropout" not in forward
    for line in ("padding_idx=base_layer.padding_idx", "max_norm=base_layer.max_norm",
                 "scale_grad_by_freq=base_layer.scale_grad_by_freq"):  # fmt: skip
        assert line in embed, line


def test_peft_dora() -> None:
    model: Any = with_lora(tiny_llama(), target_modules=["q_proj"], use_dora=True)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    variant, magnitude = layer.lora_variant["default"], layer.lora_magnitude_vector["default"]
    assert type(variant).__module__ == "peft.tuners.lora.variants"
    assert type(variant).__name__ == "DoraLinearVariant"
    assert magnitude.weight.shape == (64,)
    # The lines whose meaning dora_linear reproduces.
    for function, line in (
        (magnitude.get_weight_norm, "weight_norm = torch.linalg.norm(weight, dim=1)"),
        (magnitude.forward, "weight_norm = weight_norm.detach()"),
        (magnitude.forward, "mag_norm_scale = (magnitude / weight_norm).view(1, -1)"),
        (magnitude.forward, "(mag_norm_scale - 1) * base_result + mag_norm_scale * lora_result"),
        (variant.forward, "if isinstance(dropout, nn.Identity) or not module.training:"),
    ):
        assert line in inspect.getsource(function), line


def test_peft_trainable_tokens() -> None:
    indices = {"embed_tokens": [3, 5]}
    model: Any = with_lora(tiny_llama(), target_modules=["q_proj"], trainable_token_indices=indices)
    wrapper = model.base_model.model.model.embed_tokens
    layer = wrapper.token_adapter
    for name in ("base_layer", "active_adapters", "disable_adapters", "merged"):
        assert hasattr(layer, name), name
    assert layer.token_indices["default"] == [3, 5]
    assert layer.trainable_tokens_delta["default"].shape == (2, 64)
    # The lines whose meaning embedding_with_rows and linear_with_rows reproduce.
    for function, line in (
        (layer.get_merged_weights, "deltas = self.trainable_tokens_delta[adapter_name].to(W)"),
        (layer.get_merged_weights, "W = W.index_copy(dim=0, index=index, source=deltas)"),
        (layer.forward_adapters, "result = result * embed_scale.to(result.dtype)"),
    ):
        assert line in inspect.getsource(function), line


def test_peft_mixed_batches_and_copies_of_modules() -> None:
    from fasttune.integrations import peft_mixed

    model: Any = with_lora(
        tiny_llama(), target_modules=["q_proj"], modules_to_save=["lm_head"],
        trainable_token_indices=[3],
    )  # fmt: skip
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    source = inspect.getsource(type(layer)._mixed_batch_forward)
    assert f'if active_adapter == "{peft_mixed.BASE}":' in source
    with pytest.raises(ValueError, match="adapter_names"):
        peft_mixed.check_forward_args(layer, torch.ones(2, 64), (), {"adapter_names": ["default"]})
    copies = dict(peft_mixed.copies_of_modules(model))
    assert {name.rpartition(".")[2] for name in copies} == {"lm_head", "embed_tokens"}
    assert all(adapters == {"default"} for adapters in copies.values())
    head = model.base_model.model.lm_head
    for name in ("original_module", "modules_to_save", "active_adapters", "disable_adapters"):
        assert hasattr(head, name), name


def test_peft_ia3_linear() -> None:
    from peft import IA3Config, get_peft_model

    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    model: Any = get_peft_model(tiny_llama(), config)
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    for name in ("base_layer", "ia3_l", "is_feedforward", "in_features", "out_features",
                 "active_adapters", "disable_adapters", "merged"):  # fmt: skip
        assert hasattr(layer, name), name
    source = inspect.getsource(type(layer).forward)
    # The lines whose meaning patching/ia3.py reproduces.
    for line in (
        "ia3_scaling *= self.ia3_l[active_adapter].flatten()",
        "dtype = self.ia3_l[active_adapter].dtype",
        "x = x.to(dtype)",
        "interm = (x * ia3_scaling).to(previous_dtype)",
        "result = self.base_layer(interm, *args, **kwargs)",
        "result = (result * ia3_scaling).to(result_dtype)",
    ):
        assert line in source, line


def test_peft_param_wrapper() -> None:
    from peft.tuners.lora.layer import ParamWrapper

    stack = nn.Module()
    stack.register_parameter("weight", nn.Parameter(torch.randn(3, 6, 5)))
    config = LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=["experts.weight"])
    model = get_peft_model(nn.ModuleDict({"experts": stack}), config)
    layer = model.base_model.model["experts"]
    assert type(layer) is ParamWrapper
    for name in ("base_layer", "lora_A", "lora_B", "scaling", "lora_variant", "active_adapters",
                 "disable_adapters", "merged", "parameter_name", "num_experts"):  # fmt: skip
        assert hasattr(layer, name), name
    nn.init.normal_(layer.lora_B["default"].weight)
    # The factors that experts take from PEFT are those of what PEFT adds to the parameter.
    left, right, scaling = layer.get_delta_factors("default")
    assert (left.shape, right.shape, scaling) == ((3, 6, 2), (3, 2, 5), 3.0)
    delta = layer.get_delta_weight("default")
    assert torch.allclose(scaling * (left @ right), delta, atol=1e-6)
    source = inspect.getsource(ParamWrapper.forward)
    for line in (
        "with self._activate_lora(self.active_adapters):",
        "result = self.base_layer(x, *args, **kwargs)",
    ):
        assert line in source, line


def test_peft_ia3_on_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")
    from peft.tuners.ia3.bnb import Linear4bit, Linear8bitLt

    for layer in (Linear4bit, Linear8bitLt):
        source = inspect.getsource(layer.forward)
        for line in (
            "(not torch.is_autocast_enabled()) and (x.dtype != torch.float32)",
            "result = self.base_layer(x * ia3_scaling)",
            "result = result * ia3_scaling",
        ):
            assert line in source, line


def test_torch_grouped_products_reach_the_name_that_is_looked_for() -> None:
    seen = []

    class Watcher:
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(
                (function, len(args), sorted(k for k, v in kwargs.items() if v is not None))
            )

    offs = torch.tensor([2, 3], dtype=torch.int32)
    torch.nn.functional.grouped_mm(torch.ones(3, 8), Watcher(), offs=offs)
    assert seen == [(_torch.grouped_mm, 2, ["offs"])]


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


def test_peft_vera_adalora_and_delora() -> None:
    from peft import AdaLoraConfig, DeloraConfig, VeraConfig

    common = ("base_layer", "in_features", "out_features", "active_adapters", "disable_adapters",
              "merged")  # fmt: skip
    expected = {
        VeraConfig: (
            ("vera_A", "vera_B", "vera_lambda_d", "vera_lambda_b", "vera_dropout"),
            (
                "sliced_A = vera_A[:, : self.in_features].to(x.device)",
                "sliced_B = vera_B[: self.out_features, :].to(x.device)",
                "x = self._cast_input_dtype(x, lambda_d.dtype)",
                "lambda_b * F.linear(lambda_d * F.linear(dropout(x), sliced_A), sliced_B)",
                "result = result.to(previous_dtype)",
            ),
        ),
        AdaLoraConfig: (
            ("lora_A", "lora_B", "lora_E", "ranknum", "lora_dropout", "scaling"),
            (
                "ranknum = self.ranknum[active_adapter] + 1e-5",
                "x = self._cast_input_dtype(x, lora_A.dtype)",
                "result += (dropout(x) @ (lora_A * lora_E).T @ lora_B.T) * scaling / ranknum",
            ),
        ),
    }
    expected[DeloraConfig] = (
        ("delora_A", "delora_B", "delora_lambda", "delora_w_norm", "delora_dropout", "r"),
        (
            "linear(x_d * self.delora_w_norm[adapter], self.delora_A[adapter])",
            "An = torch.clamp(self.delora_A[adapter].norm(dim=1), min=1e-4)",
            "Bn = torch.clamp(self.delora_B[adapter].norm(dim=0), min=1e-4)",
            "scaling = (self.delora_lambda[adapter] / self.r[adapter]) / (An * Bn)",
            "h = nn.functional.linear(h, self.delora_B[adapter])",
            "result = base_out + add_out.to(base_out.dtype)",
            "result = result.to(previous_dtype)",
        ),
    )
    for config, (names, lines) in expected.items():
        options = {"total_step": 10} if config is AdaLoraConfig else {}
        model: Any = get_peft_model(tiny_llama(), config(target_modules=["k_proj"], **options))
        layer = model.base_model.model.model.layers[0].self_attn.k_proj
        for name in (*common, *names):
            assert hasattr(layer, name), name
        source = inspect.getsource(type(layer).forward)
        # The lines whose meaning patching/lowrank.py reproduces.
        for line in lines:
            assert line in source, line


def test_peft_prefix_encoder() -> None:
    from peft import PeftModel, PrefixEncoder, PrefixTuningConfig

    options = {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8}
    model = get_peft_model(tiny_llama(), PrefixTuningConfig(task_type="CAUSAL_LM", **options))
    encoder = model.prompt_encoder["default"]
    assert type(encoder) is PrefixEncoder and encoder.prefix_projection is True
    assert [type(part) for part in encoder.transform] == [nn.Linear, nn.Tanh, nn.Linear]
    assert encoder.embedding.num_embeddings == 3
    source = inspect.getsource(PrefixEncoder.forward)
    # The lines whose meaning patching/prefix.py reproduces.
    for line in (
        "prefix_tokens = self.embedding(prefix)",
        "past_key_values = self.transform(prefix_tokens)",
    ):
        assert line in source, line
    source = inspect.getsource(PeftModel.get_prompt)
    for line in (".expand(batch_size, -1)", "past_key_values = prompt_encoder(prompt_tokens)"):
        assert line in source, line


def test_transformers_checkpointed_layers_and_their_cache() -> None:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer
    from transformers.modeling_layers import GradientCheckpointingLayer

    assert GradientCheckpointingLayer._can_checkpoint_with_cache is False
    assert "if not self._can_checkpoint_with_cache:" in inspect.getsource(
        GradientCheckpointingLayer.__init_subclass__
    )
    model: Any = tiny_llama()
    model.gradient_checkpointing_enable()
    layer = model.model.layers[0]
    assert isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing is True
    assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is False
    states = torch.randn(2, 1, 2, 4, 8).unbind()
    cache = DynamicCache([states])
    assert cache.offloading is False and [type(each) for each in cache.layers] == [DynamicLayer]
    assert all(torch.equal(a, b) for a, b in zip((cache.layers[0].keys, cache.layers[0].values),
                                                 states, strict=True))  # fmt: skip


def test_triton_s_hooks_around_a_compilation() -> None:
    """tests/patching/test_warmup.py calls them; here is what integrations/triton.py relies on."""
    triton = pytest.importorskip("triton")
    knobs, JITFunction = triton.knobs, triton.JITFunction
    assert hasattr(knobs.runtime, "jit_cache_hook")
    assert hasattr(knobs.runtime, "jit_post_compile_hook")
    assert hasattr(knobs.compilation, "listener") and isinstance(knobs.cache.dir, str)
    source = inspect.getsource(JITFunction._do_compile)
    before, compiled, after = (
        source.index(text)
        for text in (
            "_call_hook(knobs.runtime.jit_cache_hook",
            "kernel = self.compile(src",
            "self._call_hook(knobs.runtime.jit_post_compile_hook, key, signature, target, device, "
            "constexprs, options,\n                            [attrs], warmup)",
        )
    )
    assert before < compiled < after
    # A true value means that the kernel is not compiled.
    assert "warmup):\n            return None" in source
    assert "cache_hit=True" in inspect.getsource(triton.compiler.compiler.compile)
