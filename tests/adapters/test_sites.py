"""Where adapters go is found by a forward without weights: no names, nothing changed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fasttune
from fasttune import adapters
from fasttune.adapters import _sites
from fasttune.testing.families import FAMILIES

BY_NAME = {family.name: family for family in FAMILIES}
LLAMA = ("model.layers", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
PACKED = ("model.layers", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
BLOOM = ("transformer.h", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
FC = ("fc1", "fc2")
MLP = ("mlp.fc1", "mlp.fc2")


def _bert(name: str) -> tuple[str, ...]:
    return (f"{name}.encoder.layer", "attention.output.dense", "intermediate.dense", "output.dense")


def _t5(kind: str, *attentions: str) -> tuple[str, ...]:
    at = f"layer.{len(attentions)}.DenseReluDense"
    places = [f"layer.{i}.{attention}.o" for i, attention in enumerate(attentions)]
    return (f"{kind}.block", *places, f"{at}.wi_0", f"{at}.wo")


def _both(*parts: str) -> list[tuple[str, ...]]:
    encoder = ("model.encoder.layers", "self_attn.out_proj", *parts)
    decoder = ("model.decoder.layers", "self_attn.out_proj", "encoder_attn.out_proj", *parts)
    return [encoder, decoder]


def _towers() -> list[tuple[str, ...]]:
    towers = ("text_model", "vision_model")
    return [(f"{tower}.encoder.layers", "self_attn.out_proj", *MLP) for tower in towers]


# Of every stack of two blocks: the ends of its attentions, the first and the last layer of its MLP.
EXPECTED: dict[str, list[tuple[str, ...]]] = {
    **{
        name: [LLAMA]
        for name in (
            "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "cohere", "granite",
            "olmo2", "smollm3", "stablelm",
        )
    },
    "phi3": [PACKED],
    "glm4": [PACKED],
    "starcoder2": [("model.layers", "self_attn.o_proj", "mlp.c_fc", "mlp.c_proj")],
    "nemotron": [("model.layers", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")],
    "gpt_neox": [("gpt_neox.layers", "attention.dense", *BLOOM[2:])],
    "gpt2": [("transformer.h", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")],
    "opt": [("model.decoder.layers", "self_attn.out_proj", *FC)],
    "bloom": [BLOOM],
    "falcon": [BLOOM],
    "bert": [_bert("bert")],
    "roberta": [_bert("roberta")],
    "electra": [_bert("electra")],
    "deberta-v2": [_bert("deberta")],
    "modernbert": [("model.layers", "attn.Wo", "mlp.Wi", "mlp.Wo")],
    "distilbert": [
        ("distilbert.transformer.layer", "attention.out_lin", "ffn.lin1", "ffn.lin2")
    ],
    "t5": [_t5("encoder", "SelfAttention"), _t5("decoder", "SelfAttention", "EncDecAttention")],
    "bart": _both(*FC),
    "whisper": _both(*FC),
    "vit": [("vit.layers", "attention.o_proj", *MLP)],
    "deit": [("deit.layers", "attention.o_proj", *MLP)],
    "clip": _towers(),
    "siglip": _towers(),
}  # fmt: skip
EXPECTED["albert"] = [
    (
        "albert.encoder.albert_layer_groups",
        *(f"albert_layers.0.{part}" for part in ("attention.dense", "ffn", "ffn_output")),
    )
]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_family_has_the_sites_that_its_authors_name(name: str) -> None:
    assert len(EXPECTED) == len(FAMILIES) - 3  # those with experts
    model = BY_NAME[name].build()
    every, beside, blocks = [], {}, []
    for stack, *attentions, first, last in EXPECTED[name]:
        for i in range(1 if name == "albert" else 2):
            block = f"{stack}.{i}"
            blocks.append(block)
            every += [f"{block}.{part}" for part in (*attentions, last)]
            beside[f"{block}.{last}"] = f"{block}.{first}"
    assert list(_sites.find(model, "double_seq_bn")) == every
    assert list(_sites.find(model, "seq_bn")) == list(beside)
    assert {k: site.source for k, site in _sites.find(model, "par_bn").items()} == beside
    assert list(_sites.find(model, "adapter_plus")) == blocks


WIDTHS = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 99, "image_size": 32, "patch_size": 8,
}  # fmt: skip
CONVOLUTIONS = {
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
}  # fmt: skip
SWIN = {
    "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "image_size": 32, "patch_size": 2,
    "window_size": 4,
}  # fmt: skip
SEGFORMER = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 16, 32]}
STAGES = [f"stages.{i}.blocks.0" for i in (0, 1, 2)] + ["stages.2.blocks.1", "stages.3.blocks.0"]
TWO = ["0", "1"]
# Stages of blocks; two MLPs and a layer defined after the output; a forward that asks for values;
# inputs of other shapes. The class, its configuration, the blocks, and the parts of one.
OTHERS: list[tuple[str, dict[str, Any], str, list[str], tuple[str, ...]]] = [
    (
        "SwinForImageClassification", SWIN, "swin.encoder",
        [f"layers.{i}.blocks.{j}" for i, j in ((0, 0), (1, 0), (1, 1))],
        ("attention.o_proj", *MLP),
    ),
    (
        "SegformerForImageClassification", SEGFORMER, "segformer", STAGES,
        ("attention.o_proj", *MLP),
    ),
    (
        "Wav2Vec2ConformerForCTC", {**WIDTHS, **CONVOLUTIONS}, "wav2vec2_conformer.encoder.layers",
        TWO, ("self_attn.linear_out", "ffn2.intermediate_dense", "ffn2.output_dense"),
    ),
    (
        "LongformerForMaskedLM", {**WIDTHS, "attention_window": 4}, "longformer.encoder.layer",
        TWO, _bert("longformer")[1:],
    ),
    (
        "VideoMAEForVideoClassification", {**WIDTHS, "num_frames": 4}, "videomae.encoder.layer",
        TWO, _bert("videomae")[1:],
    ),
    (
        "ASTForAudioClassification", WIDTHS, "audio_spectrogram_transformer.layers",
        TWO, ("attention.o_proj", *MLP),
    ),
    (
        "BartForSequenceClassification",
        {
            "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 2,
            "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        },
        "model.encoder.layers", TWO, ("self_attn.out_proj", *FC),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "stack", "blocks", "parts"), OTHERS, ids=lambda v: v)
def test_other_structures_are_found(
    name: str, options: dict[str, Any], stack: str, blocks: list[str], parts: tuple[str, ...]
) -> None:
    import transformers

    cls = getattr(transformers, name)
    model = cls(cls.config_class(**options))
    attention, first, last = parts
    names = [f"{stack}.{block}" for block in blocks]
    found = [key for key in _sites.find(model, "double_seq_bn") if key.startswith(stack)]
    assert found == [f"{block}.{part}" for block in names for part in (attention, last)]
    beside = {k: v.source for k, v in _sites.find(model, "par_bn").items() if k.startswith(stack)}
    assert beside == {f"{block}.{last}": f"{block}.{first}" for block in names}


class Mixer(nn.Module):
    """An attention whose class does not say so, with its output layer defined first."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.end, self.start = nn.Linear(size, size), nn.Linear(size, 3 * size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.start(x).chunk(3, -1)
        return self.end((q @ k.mT).softmax(-1) @ v)


class Attention(nn.Module):
    """An MLP whose class says that it attends, defined before the attention, last layer first."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(2 * size, size), nn.Linear(size, 2 * size)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(x).relu())


class Layer(nn.Module):
    def __init__(self, size: int, post_norm: bool) -> None:
        super().__init__()
        self.b, self.a = Attention(size), Mixer(size)
        self.norm_b, self.norm_a = nn.LayerNorm(size), nn.LayerNorm(size)
        self.post_norm = post_norm

    def forward(self, x: Tensor) -> Tensor:
        if self.post_norm:
            x = self.norm_a(x + self.a(x))
            return self.norm_b(x + self.b(x))
        x = x + self.a(self.norm_a(x))
        return x + self.b(self.norm_b(x))


class Stack(nn.Module):
    def __init__(self, size: int = 16, post_norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(size, post_norm) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_neither_names_nor_the_order_of_definition_count() -> None:
    example = {"x": torch.zeros(1, 5, 16)}
    found = _sites.find(Stack(), "double_seq_bn", example)
    assert list(found) == [f"layers.{i}.{part}" for i in (0, 1) for part in ("a.end", "b.narrow")]
    beside = _sites.find(Stack(), "par_bn", example)
    assert {k: v.source for k, v in beside.items()} == {
        f"layers.{i}.b.narrow": f"layers.{i}.b.wide" for i in (0, 1)
    }


@pytest.mark.parametrize("post_norm", [False, True])
def test_the_norms_around_the_mlp_are_found(post_norm: bool) -> None:
    model, example = Stack(post_norm=post_norm), {"x": torch.zeros(1, 5, 16)}
    after = _sites.find(model, "hub_seq_bn", example)
    assert list(after) == [f"layers.{i}" + ".norm_b" * post_norm for i in (0, 1)]
    assert [site.before for site in after.values()] == [post_norm, post_norm]
    beside = _sites.find(model, "hub_par_bn", example)
    given = "b.wide" if post_norm else "norm_b"
    assert [site.source for site in beside.values()] == [f"layers.{i}.{given}" for i in (0, 1)]


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("placement", ["hub_seq_bn", "hub_par_bn"])
def test_hub_placements_compute_what_the_documentation_says(
    placement: str, post_norm: bool
) -> None:
    model, x = Stack(post_norm=post_norm), torch.randn(2, 5, 16)
    adapters.add(model, "s", placement, reduction_factor=4, scaling=2.0, example={"x": x})
    bank = {k: m for k, m in model.named_modules() if k.endswith(".adapters.s")}
    assert len(bank) == 2
    for adapter in bank.values():
        nn.init.normal_(adapter.up.weight)
    expected = x
    for layer, adapter in zip(model.layers, bank.values(), strict=True):

        def branch(x: Tensor, adapter: Any = adapter) -> Tensor:
            return 2.0 * adapter.up(adapter.down(x).relu())

        def mlp(x: Tensor, layer: Any = layer) -> Tensor:
            h = functional.linear(x, layer.b.wide.weight, layer.b.wide.bias).relu()
            return functional.linear(h, layer.b.narrow.weight, layer.b.narrow.bias)

        def norm(x: Tensor, norm: Any = layer.norm_b) -> Tensor:
            return functional.layer_norm(x, (16,), norm.weight, norm.bias)

        if post_norm:
            r = layer.norm_a(expected + layer.a(expected))
            z = r + mlp(r)
            z = z + (branch(norm(z)) if placement == "hub_seq_bn" else branch(r))
            expected = norm(z)
        else:
            r = expected + layer.a(layer.norm_a(expected))
            z = r + mlp(norm(r))
            expected = z + branch(z if placement == "hub_seq_bn" else r)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("placement", _sites.PLACEMENTS)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_adapters_that_are_there_change_no_sites(name: str, placement: str) -> None:
    model = BY_NAME[name].build()
    expected = {key: _sites.find(model, key) for key in _sites.PLACEMENTS}
    adapters.add(model, "s", placement)
    assert {key: _sites.find(model, key) for key in _sites.PLACEMENTS} == expected


def test_two_parallel_adapters_of_one_layer_take_their_own_inputs() -> None:
    model, x = Stack(), torch.randn(2, 5, 16)
    single = {}
    for placement in ("par_bn", "hub_par_bn"):
        adapters.add(model, placement, placement, reduction_factor=4, example={"x": x})
        for key, parameter in model.named_parameters():
            if f".{placement}.up.weight" in key:
                nn.init.normal_(parameter)
        single[placement] = model(x)
    adapters.stack(model, "par_bn", "hub_par_bn")
    both = model(x)
    adapters.remove(model, "par_bn")
    torch.testing.assert_close(model(x), single["hub_par_bn"])
    assert not torch.allclose(both, single["hub_par_bn"])
    adapters.remove(model, "hub_par_bn")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit"])
def test_no_weight_is_read_and_nothing_changes(name: str) -> None:
    family = BY_NAME[name]
    plain = family.build()
    expected = _sites.find(plain, "double_seq_bn")
    with torch.device("meta"):
        nowhere = family.build()
        assert _sites.find(nowhere, "double_seq_bn") == expected  # whatever the default device
    assert all(parameter.is_meta for parameter in nowhere.parameters())
    assert _sites.find(nowhere, "double_seq_bn") == expected

    model = fasttune.patch(family.build()).train()
    calls: list[int] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: calls.append(1))
    before = {key: dict(module.__dict__) for key, module in model.named_modules()}
    implementation = model.config._attn_implementation
    state, explained = torch.get_rng_state(), str(fasttune.explain(model))
    assert _sites.find(model, "double_seq_bn") == expected
    assert not calls and torch.equal(torch.get_rng_state(), state)
    assert {key: dict(module.__dict__) for key, module in model.named_modules()} == before
    assert model.config._attn_implementation == implementation
    assert str(fasttune.explain(model)) == explained


X = {"x": torch.zeros(1, 5, 16)}


class Packed(nn.Linear):
    """As a quantised layer: its weight has another shape and dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight = nn.Parameter(torch.zeros(7, dtype=torch.uint8), False)

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the weight would be read")


def test_packed_weights_are_no_obstacle() -> None:
    model = BY_NAME["llama"].build(torch.bfloat16)
    expected = _sites.find(model, "par_bn")
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Packed(getattr(layer.mlp, name)))
    assert _sites.find(model, "par_bn") == expected


def test_a_forward_that_asks_for_values_changes_nothing_either() -> None:
    class Asks(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[float] = []
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.seen.append(float(self.count))
            return super().forward(x) if self.count > 0 else x

    model = Asks()
    expected = _sites.find(Stack(), "par_bn", X)
    state = torch.get_rng_state()
    assert _sites.find(model, "par_bn", X) == expected
    assert model.count == 0 and model.seen == []
    assert torch.equal(torch.get_rng_state(), state)


class Unreached(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.ModuleList(Layer(16, False) for _ in range(2))


class Experts(nn.Module):
    """Two linear layers, and a router that chooses among some more."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gate, self.wide = nn.Linear(size, 4), nn.Linear(size, 2 * size)
        self.narrow = nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.gate(x).softmax(-1).topk(2, -1).values
        return self.narrow(self.wide(x).relu()) * weight.sum(-1, keepdim=True)


class Wrapper(nn.Module):
    """No model of transformers, but around one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: Tensor) -> Tensor:
        return self.inner(input_ids=pixels).logits


def test_a_model_of_transformers_inside_another_model_is_found() -> None:
    found = _sites.find(Wrapper(BY_NAME["llama"].build()), "seq_bn")
    assert list(found) == [f"inner.model.layers.{i}.mlp.down_proj" for i in (0, 1)]


def _experts() -> nn.Module:
    model = Stack()
    for layer in model.layers:
        layer.b = Experts(16)
    return model


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (Stack(), None, r"that runs layers, got none \(Stack is no model of transformers\)"),
        (Stack(), {"y": torch.zeros(1)}, r"got none in Stack \(the model raised TypeError"),
        (Stack(), {"x": torch.zeros(1, 5, 3)}, r"got none in Stack \(the model raised RuntimeErr"),
        (_experts(), X, "expected one MLP in layers.0, got experts"),
        (nn.ModuleList([nn.Linear(4, 4)]), None, "got none in ModuleList"),
        (nn.ModuleList([nn.ModuleList([])]), None, "got none in ModuleList"),
    ],
)
def test_what_is_not_found_is_named_and_the_model_unchanged(
    model: nn.Module, example: Any, message: str
) -> None:
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=message):
        adapters.add(model, "s", example=example)
    assert dict(model.named_parameters()) == before
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_example_of_another_type_is_named() -> None:
    with pytest.raises(TypeError, match="example: expected a mapping, got Tensor"):
        adapters.add(Stack(), "s", example=torch.zeros(1))  # type: ignore[arg-type]


def test_what_an_example_leaves_out_gets_no_adapters() -> None:
    model = Unreached()
    adapters.add(model, "s", example=X)
    assert not any(key.startswith("more.") for key in model.state_dict() if ".adapters." in key)
    assert any(key.startswith("layers.") for key in model.state_dict() if ".adapters." in key)


def test_a_part_that_cannot_run_is_no_silent_gap() -> None:
    model = BY_NAME["clip"].build()
    model.vision_model.embeddings.forward = None  # an instance's forward is not the class's
    assert len(_sites.find(model, "seq_bn")) == 4
    model.vision_model.embeddings.patch_embedding = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"that runs vision_model\.encoder\.layers, got none"):
        _sites.find(model, "seq_bn")
