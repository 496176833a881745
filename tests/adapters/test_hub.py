"""Checkpoints of the library adapters 1.3: its names and fields, and its own outputs (slow)."""

import json
import logging
import os
import subprocess
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_library import FAMILIES, kinds, logits
from torch import Tensor, nn

from fasttune import adapters
from fasttune.testing.families import FAMILIES as OURS

BY_NAME = {family.name: family for family in OURS}
SCRIPT = Path(__file__).with_name("hub_library.py")
# As adapters 1.3.0 writes "double_seq_bn" with reduction_factor=8 of a width of 32: fields of
# adapter_config.json that count, and what is before the parameters in the weights.
RECORDED = {
    "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0,
    "factorized_phm_W": True, "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert",
    "init_weights_seed": None, "inv_adapter": None, "inv_adapter_reduction_factor": None,
    "is_parallel": False, "learn_phm": True, "leave_out": [], "ln_after": False,
    "ln_before": False, "mh_adapter": True, "non_linearity": "swish", "original_ln_after": True,
    "original_ln_before": False, "output_adapter": True, "phm_bias": True, "phm_c_init": "normal",
    "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False, "phm_rank": 1,
    "reduction_factor": 8, "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False,
    "shared_phm_rule": True, "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip
PLACES = {
    "bart": (
        "model.decoder.layers.{}.attention_adapters", "model.decoder.layers.{}.output_adapters",
        "model.encoder.layers.{}.attention_adapters", "model.encoder.layers.{}.output_adapters",
    ),
    "bert": ("bert.encoder.layer.{}.attention.output", "bert.encoder.layer.{}.output"),
    "llama": ("model.layers.{}.attention_adapters", "model.layers.{}.output_adapters"),
    "t5": (
        "decoder.block.{}.layer.0", "decoder.block.{}.layer.2",
        "encoder.block.{}.layer.0", "encoder.block.{}.layer.1",
    ),
    "vit": (
        "vit.encoder.layer.{}.attention_adapters",
        "vit.encoder.layer.{}.output.output_adapters",
    ),
}  # fmt: skip
SHAPES = {
    "adapter_down.0.weight": (4, 32), "adapter_down.0.bias": (4,),
    "adapter_up.weight": (32, 4), "adapter_up.bias": (32,),
}  # fmt: skip


def layout(family: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{place.format(i)}.adapters.s.{key}": shape
        for i in (0, 1)
        for place in PLACES[family]
        for key, shape in SHAPES.items()
    }


def recorded(folder: Path, family: str, file: dict[str, Any] | None = None, **fields: Any) -> Path:
    """A checkpoint as that library writes it, of random weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = layout(family)
    weights = {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}
    folder.mkdir(exist_ok=True)
    torch.save(weights, folder / "pytorch_adapter.bin")
    whole = {
        "config": {**RECORDED, **fields}, "hidden_size": 32, "model_class": "Any", "name": "s",
        "model_name": "", "model_type": family, "version": "adapters.1.3.0", **(file or {}),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    return folder


@pytest.mark.parametrize("family", PLACES)
def test_a_recorded_layout_is_read_and_written(family: str, tmp_path: Path) -> None:
    path = recorded(tmp_path / "theirs", family)
    model = BY_NAME[family].build().eval()
    assert adapters.load(model, path) == "s"
    theirs = torch.load(path / "pytorch_adapter.bin")
    own = {key: p for key, p in model.named_parameters() if ".adapters.s." in key}
    assert len(own) == len(theirs) == 8 * len(PLACES[family])
    layer = {
        "bart": "model.decoder.layers.1.self_attn.out_proj",
        "bert": "bert.encoder.layer.1.attention.output.dense",
        "llama": "model.layers.1.self_attn.o_proj",
        "t5": "decoder.block.1.layer.0.SelfAttention.o",
        "vit": "vit.layers.1.attention.o_proj",
    }[family]
    key = f"{PLACES[family][0].format(1)}.adapters.s.adapter_down.0.weight"
    assert torch.equal(own[f"{layer}.adapters.s.down.weight"], theirs[key])
    assert {p.activation for p in _adapters(model)} == {"silu"}

    adapters.save(model, "s", tmp_path / "ours", layout="adapters")
    written = torch.load(tmp_path / "ours" / "pytorch_adapter.bin", weights_only=True)
    assert {key: tuple(value.shape) for key, value in written.items()} == layout(family)
    assert all(torch.equal(value, theirs[key]) for key, value in written.items())
    file = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert file["model_type"] == family and file["version"] == "adapters.1.3.0"
    differs = {k for k, v in file["config"].items() if RECORDED[k] != v}
    assert differs == {"non_linearity"} and file["config"]["non_linearity"] == "silu"


def _adapters(model: nn.Module) -> list[Any]:
    return [m for k, m in model.named_modules() if k.endswith(".adapters.s")]


@pytest.mark.parametrize(
    ("family", "place", "layer"),
    [
        ("t5", "decoder.block.1.layer.1", "decoder.block.1.layer.1.EncDecAttention.o"),
        (
            "bart",
            "model.decoder.layers.1.cross_attention_adapters",
            "model.decoder.layers.1.encoder_attn.out_proj",
        ),
    ],
)
def test_adapters_at_the_attention_to_an_encoder(
    family: str, place: str, layer: str, tmp_path: Path
) -> None:
    model = BY_NAME[family].build().eval()
    adapters.add(model, "s", "double_seq_bn", reduction_factor=8)
    own = dict(model.named_parameters())
    for key, parameter in own.items():
        if ".adapters.s." in key:
            nn.init.normal_(parameter)
    adapters.save(model, "s", tmp_path, layout="adapters")
    written = torch.load(tmp_path / "pytorch_adapter.bin", weights_only=True)
    assert len(written) == 4 * (2 * 2 + 2 * 3)
    expected = own[f"{layer}.adapters.s.down.weight"]
    assert torch.equal(written[f"{place}.adapters.s.adapter_down.0.weight"], expected)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["config"]["cross_adapter"]
    other = BY_NAME[family].build().eval()
    adapters.load(other, tmp_path)
    read = dict(other.named_parameters())
    assert all(torch.equal(read[key], p) for key, p in own.items() if ".adapters.s." in key)


def test_an_encoder_has_no_attention_to_leave_out(tmp_path: Path) -> None:
    model = BY_NAME["bert"].build()
    adapters.add(model, "s", "hub_double_seq_bn", reduction_factor=8)
    adapters.save(model, "s", tmp_path, layout="adapters")
    written = torch.load(tmp_path / "pytorch_adapter.bin", weights_only=True)
    assert written.keys() == layout("bert").keys()
    adapters.load(model, tmp_path, "t")
    assert model.state_dict().keys() >= {
        key.replace(".adapters.s.", ".adapters.t.") for key in model.state_dict()
    }


def test_cross_adapters_alone_are_refused(tmp_path: Path) -> None:
    path = recorded(tmp_path, "t5", mh_adapter=False, cross_adapter=True)
    with pytest.raises(ValueError, match="mh_adapter: expected True, got False"):
        adapters.load(BY_NAME["t5"].build(), path)


def test_safetensors_names_without_a_head_and_another_name_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = recorded(tmp_path, "llama")
    weights = torch.load(path / "pytorch_adapter.bin")
    expected = BY_NAME["llama"].build().eval()
    adapters.load(expected, path)
    (path / "pytorch_adapter.bin").unlink()
    headless = {key.removeprefix("model."): value for key, value in weights.items()}
    save_file(headless, path / "adapter.safetensors")
    model = BY_NAME["llama"].build().eval()
    assert adapters.load(model, path, "other") == "other"
    batch = BY_NAME["llama"].batch()
    assert torch.equal(model(**batch).logits, expected(**batch).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"phm_layer": True}, "phm_layer: expected False, got True"),
        ({"use_gating": True}, "use_gating: expected False, got True"),
        ({"ln_before": True}, "ln_before: expected False, got True"),
        ({"ln_after": True}, "ln_after: expected False, got True"),
        ({"inv_adapter": "nice"}, "inv_adapter: expected None, got 'nice'"),
        ({"cross_adapter": True}, "cross_adapter: expected False, got True"),
        ({"leave_out": [1]}, r"leave_out: expected \[\], got \[1\]"),
        ({"stochastic_depth": 0.1}, "stochastic_depth: expected 0.0, got 0.1"),
        ({"output_adapter": False}, "output_adapter: expected True, got False"),
        ({"original_ln_before": True}, "original_ln_before: expected False, got True"),
        ({"original_ln_after": False}, "original_ln_after: expected True, got False"),
        ({"is_parallel": True}, "mh_adapter: expected False, got True|is_parallel: expected"),
        ({"architecture": "lora"}, "architecture: expected None, got 'lora'"),
        ({"reduction_factor": {"default": 2}}, "reduction_factor: expected one number"),
        ({"reduction_factor": 0.1}, "reduction_factor: expected one number"),
        ({"non_linearity": "mish"}, "non_linearity: expected one of relu, .*got 'mish'"),
        ({"scaling": "other"}, "scaling: expected a number or one of learned, channel"),
        ({"surprise": 1}, "surprise: expected no such field, got 1"),
        ({"reduction_factor": 4}, "directory: expected the adapter of such a model"),
        ({"mh_adapter": False}, "directory: expected the adapter of a llama with 2 adapters"),
    ],
)
def test_what_cannot_be_represented_is_named(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _refused(recorded(tmp_path, "llama", **fields), message)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"model_type": "bert"}, "model_type: expected 'llama', got 'bert'"),
        ({"version": "3.2.1"}, "version: expected adapters. and a number, got '3.2.1'"),
        ({"hidden_size": None}, "hidden_size: expected a number, got None"),
        ({"config": None}, "dropout: expected a value, got None"),
        ({"name": None}, "directory: expected a bottleneck adapter, got another file"),
    ],
)
def test_files_of_others_are_named(file: dict[str, Any], message: str, tmp_path: Path) -> None:
    _refused(recorded(tmp_path, "llama", file), message)


def _refused(path: Path, message: str) -> None:
    model = BY_NAME["llama"].build()
    adapters.add(model, "first", train_also=["lm_head"])
    keys = list(model.state_dict())
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match=message):
        adapters.load(model, path)
    assert list(model.state_dict()) == keys and adapters.names(model) == ("first",)
    assert trained == {key for key, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("family", "placement", "options", "message"),
    [
        ("llama", "par_bn", {}, "placement: expected one of .* got 'par_bn'"),
        ("qwen2", "seq_bn", {}, "model: expected one of the types bart, .* got qwen2"),
        ("llama", "seq_bn", {"reduction_factor": 0.1}, "reduction_factor: expected one that"),
    ],
)
def test_what_that_library_lacks_is_not_written(
    family: str, placement: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = BY_NAME[family].build()
    adapters.add(model, "s", placement, **options)
    with pytest.raises(ValueError, match=message):
        adapters.save(model, "s", tmp_path / "out", layout="adapters")
    with pytest.raises(ValueError, match="layout: expected one of fasttune, adapters, got 'peft'"):
        adapters.save(model, "s", tmp_path / "out", layout="peft")
    assert not (tmp_path / "out").exists()


def test_heads_are_left_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = recorded(tmp_path / "theirs", "llama")
    (path / "pytorch_model_head.bin").touch()
    model = BY_NAME["llama"].build()
    with caplog.at_level(logging.WARNING, "fasttune"):
        adapters.load(model, path)
        assert "pytorch_model_head.bin" in caplog.text
        adapters.add(model, "t", train_also=["lm_head"])
        adapters.save(model, "t", tmp_path / "ours", layout="adapters")
    assert "lm_head trained with the adapter t" in caplog.text
    assert (tmp_path / "ours" / "pytorch_adapter.bin").is_file()


# ------------------------------------------------------------------------ that library itself


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with adapters 1.3.0, which needs an older transformers, and the torch of here."""
    folder = tmp_path_factory.mktemp("library")
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    wanted = ["adapters==1.3.0", f"torch=={torch.__version__.partition('+')[0]}"]
    installed = subprocess.run(
        [python, "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True
    )
    assert installed.returncode == 0, installed.stderr[-2000:]
    return python


def _run(python: str, what: str, folder: Path) -> None:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [python, str(SCRIPT), what, str(folder)], env=clean, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def exchanged(library: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and outputs of that library, and its outputs with what fasttune wrote."""
    folder = tmp_path_factory.mktemp("exchanged")
    _run(library, "write", folder)
    for family in FAMILIES:
        for kind in kinds(family):
            model = _base(folder, family)
            adapters.load(model, folder / family / kind)
            adapters.save(model, kind, folder / family / f"{kind}-written", layout="adapters")
    _run(library, "read", folder)
    return folder


def _base(folder: Path, family: str) -> Any:
    import transformers

    auto = getattr(transformers, FAMILIES[family][0])
    return auto.from_pretrained(folder / family / "base", dtype=torch.float64)


def _close(found: Tensor, expected: Tensor) -> None:
    # fp64: products of a few hundred terms, in another order of sums where attention is fused.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_both_libraries_give_the_same_outputs(family: str, exchanged: Path) -> None:
    plain = torch.load(exchanged / family / "base.pt")
    _close(logits(_base(exchanged, family), family), plain)
    for kind, placement in kinds(family).items():
        model = _base(exchanged, family)
        adapters.load(model, exchanged / family / kind)
        sites = {key.split(".adapters.")[0] for key in model.state_dict() if ".adapters." in key}
        expected = torch.load(exchanged / family / f"{kind}.pt")
        assert (expected - plain).abs().max() > 0.05, kind
        _close(logits(model, family), expected)
        _close(torch.load(exchanged / family / f"{kind}-read.pt"), expected)
        other = _base(exchanged, family)
        adapters.add(other, kind, placement)
        assert sites == {k.split(".adapters.")[0] for k in other.state_dict() if ".adapters." in k}
