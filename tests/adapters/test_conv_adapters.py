"""Convolutional adapters on whole models: where, what is computed, batch norms, saving, errors."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasttune
from fasttune import adapters
from fasttune.adapters import _sites

PLACEMENTS = _sites.CONVOLUTIONS


def model_of(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1]}
    name, options = {
        "basic": ("ResNet", {**sizes, "layer_type": "basic"}),
        "bottleneck": ("ResNet", {**sizes, "layer_type": "bottleneck"}),
        "regnet": ("RegNet", {**sizes, "groups_width": 8}),
        "convnext": ("ConvNext", {**sizes, "num_stages": 2, "layer_scale_init_value": 0.5}),
    }[kind]
    config = getattr(transformers, f"{name}Config")(num_labels=3, **options)
    model = getattr(transformers, f"{name}ForImageClassification")(config)
    with torch.no_grad():  # away from the identity
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(4, 3, 48, 48, generator=generator)
    return {"pixel_values": images, "labels": torch.tensor([0, 1, 2, 0])}


def perturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


EXPECTED = {
    "basic": ("resnet.encoder.stages", "layer.0.convolution"),
    "bottleneck": ("resnet.encoder.stages", "layer.1.convolution"),
    "regnet": ("regnet.encoder.stages", "layer.1.convolution"),
    "convnext": ("convnext.encoder.stages", "dwconv"),
}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", EXPECTED)
def test_fresh_is_identity_trains_and_removes_exactly(kind: str, placement: str) -> None:
    model, (stack, layer) = model_of(kind), EXPECTED[kind]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        plain = model(**batch()).logits
    adapters.add(model, "s", placement, reduction_factor=4)
    torch.testing.assert_close(model(**batch()).logits, plain)
    sites = {key.split(".adapters.")[0] for key in model.state_dict() if ".adapters." in key}
    assert sites == {f"{stack}.{i}.layers.{j}.{layer}" for i, j in ((0, 0), (0, 1), (1, 0))}
    perturb(model)
    output = model(**batch())
    assert (output.logits - plain).abs().max() > 1e-3
    output.loss.backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".adapters.s." in key), key
    adapters.remove(model, "s")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    torch.testing.assert_close(model(**batch()).logits, plain)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_layer_computes_what_the_documentation_says(placement: str) -> None:
    model, seen = model_of("bottleneck"), {}
    adapters.add(model, "s", placement, reduction_factor=2, activation="gelu")
    perturb(model)
    layer = model.resnet.encoder.stages[1].layers[0].layer[1].convolution
    assert layer.stride == (2, 2)
    layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    model(**batch())
    adapter = layer.adapters["s"]
    plain = nn.functional.conv2d(seen["x"], layer.weight, None, 2, 1)
    x, stride = (seen["x"], 2) if placement == "conv_parallel" else (plain, 1)
    groups = adapter.down.weight.shape[0]
    assert groups == 4  # of 8 channels
    down = nn.functional.conv2d(x, adapter.down.weight, adapter.down.bias, stride, 1, groups=groups)
    up = torch.einsum("nrhw,or->nohw", nn.functional.gelu(down), adapter.up.weight[:, :, 0, 0])
    up = up + adapter.up.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(seen["y"], plain + adapter.scale.view(1, -1, 1, 1) * up)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_copies_and_a_patched_model_give_the_same_numbers(placement: str) -> None:
    model = model_of("basic")
    adapters.add(model, "s", placement, reduction_factor=4)
    perturb(model)
    expected = model(**batch()).logits
    assert torch.equal(copy.deepcopy(model)(**batch()).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**batch()).logits, expected)
    found = fasttune.patch(model)(**batch()).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_trained_adapters_and_nothing_else_are_saved(placement: str, tmp_path: Path) -> None:
    model = model_of("basic")
    frozen = {key: value.clone() for key, value in model.state_dict().items()}
    adapters.add(model, "s", placement, reduction_factor=4, train_also=["classifier"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    model.train()
    losses = []
    for _ in range(30):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    after = model.state_dict()
    changed = {key for key, value in frozen.items() if not torch.equal(after[key], value)}
    assert changed == {"classifier.1.weight", "classifier.1.bias"}
    expected = model.eval()(**batch()).logits
    adapters.save(model, "s", tmp_path)
    other = model_of("basic")
    adapters.load(other, tmp_path)
    assert torch.equal(other(**batch()).logits, expected)


def test_batch_norms_are_frozen_while_there_are_convolutional_adapters() -> None:
    model = model_of("basic").train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = norms[0].running_mean.clone()
    for name in ("a", "b"):
        adapters.add(model, name, "conv_parallel", reduction_factor=4)
    for name in ("a", "b"):
        model.train()(**batch())
        assert torch.equal(norms[0].running_mean, before)
        adapters.remove(model, name)
    assert all(norm.training for norm in norms)
    model(**batch())
    assert not torch.equal(norms[0].running_mean, before)


def test_a_trainer_writes_the_adapter_alone(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    class Images(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {key: value[i] for key, value in batch().items()}

    model = model_of("basic")
    adapters.add(model, "s", "conv_parallel", reduction_factor=4, train_also=["classifier"])
    args = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    adapters.AdapterTrainer(model, args, train_dataset=Images()).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists()
    other = model_of("basic")
    adapters.load(other, checkpoint / "adapters" / "s")
    assert torch.equal(other(**batch()).logits, model.eval()(**batch()).logits)


class Padding(nn.Conv2d):
    """Pads in its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = Padding(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolution(x)


IMAGE = {"example": {"input": torch.zeros(1, 3, 8, 8)}}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (model_of("basic"), {"reduction_factor": 3}, "reduction_factor: expected one that divides"),
        (nn.Sequential(Residual()), IMAGE, r"an image of \(6, 6\) from 0.convolution"),
        (nn.Linear(3, 3), {"example": {"input": torch.zeros(2, 3)}}, "residual blocks with conv"),
        (nn.Conv2d(3, 3, 3), {}, "got none in Conv2d .*no model of transformers"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(model: Any, options: Any, message: str) -> None:
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        adapters.add(model, "s", "conv_parallel", **options)
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
