"""Imports go downwards only, and the rules of the tree hold."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fasttune"

# Lower layers first; a module may import its own layer and those below.
LAYERS = (
    ("errors", "reason", "_torch", "memory", "allocator"),
    ("_registry", "_native", "_cpu"),
    ("ops",),
    ("nn", "optim"),
    ("patching", "integrations", "adapters"),
    ("doctor", ""),
    ("demo", "cli"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add("." * node.level + (node.module or ""))
    return found


def layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def production_files() -> list[Path]:
    return [
        path for path in PACKAGE.rglob("*.py") if "testing" not in path.relative_to(PACKAGE).parts
    ]


@pytest.mark.parametrize("path", production_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    name = layer(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    for module in imports(path):
        if not module.startswith("fasttune.") or module.startswith("fasttune_kernels"):
            continue
        target = layer(module)
        assert target != "testing", f"production code imports {module}"
        if target in RANK:
            assert RANK[target] <= RANK[name], f"{name or 'fasttune'} imports {module}"


@pytest.mark.parametrize("path", production_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_upper_layers_import_transformers_and_peft(path: Path) -> None:
    allowed = {"patching", "integrations", "demo"}
    if path.relative_to(PACKAGE).parts[0] in allowed:
        return
    assert not {m.split(".")[0] for m in imports(path)} & {
        "transformers",
        "peft",
        "trl",
        "accelerate",
    }


def test_kernels_import_torch_and_triton_only() -> None:
    for path in (ROOT / "kernels/fasttune_kernels").glob("*.py"):
        outside = {m.split(".")[0] for m in imports(path) if not m.startswith(".")}
        assert outside <= {"torch", "triton", *sys.stdlib_module_names}, path


def test_csrc_includes_no_torch() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert "torch/" not in path.read_text(), path


def test_only_native_reads_data_pointers() -> None:
    for path in production_files():
        if path.parent.name != "_native":
            assert ".data_ptr(" not in path.read_text(), path


def test_no_package_shadows_hugging_face_kernels() -> None:
    for folder in ("kernels", "tests", "bench"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_packages_are_there_once_fasttune_is_imported() -> None:
    code = (
        "import fasttune; "
        "print(fasttune.optim.AdamW.__name__, fasttune.adapters.add.__name__, "
        "fasttune.nn.RMSNorm.__name__, fasttune.ops.rope.__name__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["AdamW", "add", "RMSNorm", "rope"]


def test_importing_fasttune_imports_neither_transformers_nor_triton() -> None:
    code = (
        "import sys, fasttune; "
        "heavy = ('transformers', 'peft', 'triton', 'fasttune._cpu'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
