"""What Triton, Python and C++ each write down about an op is the same: read from the headers."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fasttune._native import lora_cuda
from fasttune._native._extension import DTYPE_CODES
from fasttune.ops._activations import ACTIVATIONS
from fasttune_kernels import adamw_tables

ROOT = Path(__file__).parents[2]
COMMON, CUDA = ROOT / "csrc/common", ROOT / "csrc/cuda"
KERNELS = ROOT / "kernels/fasttune_kernels"

Number = int | float


def code_of(header: Path) -> str:
    return re.sub(r"//.*", "", header.read_text())


def value_of(expression: str, **names: Number) -> Number:
    """A C++ constant expression without calls, as Python."""
    plain = re.sub(r"\b(0x[0-9A-Fa-f]+|\d[\d.]*(?:e-?\d+)?)[uUlLfF]*\b", r"\1", expression)
    plain = re.sub(r"(\w+) \? (\w+) : (\w+)", r"\2 if \1 else \3", plain)
    value: Number = eval(plain, {"__builtins__": {}}, names)
    return value


def expressions(code: str) -> dict[str, str]:
    """The constants k<Name> of a header, or of a part of one."""
    return dict(re.findall(r"constexpr [\w ]+ (k\w+) = ([^;{]+);", code))


def constant(header: Path, name: str, **names: Number) -> Number:
    return value_of(expressions(code_of(header))[name], **names)


def enumerators(header: Path, name: str) -> dict[str, int]:
    found = re.search(rf"enum (?:class )?{name} : \w+ {{([^}}]*)}}", code_of(header))
    assert found, f"{header.name} has no enum {name}"
    return {key: int(code) for key, code in re.findall(r"(k\w+) = (\d+)", found[1])}


def fields(header: Path, struct: str) -> tuple[str, ...]:
    found = re.search(rf"struct {struct} {{([^}}]*)}}", code_of(header))
    assert found, f"{header.name} has no struct {struct}"
    return tuple(re.findall(r"(\w+)\s*[,;]", found[1]))


def words(enumerator: str) -> str:
    """kGeluTanh as gelu_tanh."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enumerator.removeprefix("k")).lower()


def literals(module: Path, function: str) -> list[Number]:
    """The numbers written in a function, as fp32 where they are no integers."""
    tree = ast.parse(module.read_text())
    body = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function)
    found = [node.value for node in ast.walk(body) if isinstance(node, ast.Constant)]
    return [
        value if isinstance(value, int) else float(np.float32(value))
        for value in found
        if isinstance(value, (int, float))
    ]


def test_tables_of_adamw() -> None:
    header = COMMON / "adamw.h"
    assert fields(header, "AdamWAddresses") == adamw_tables.ADDRESSES
    assert fields(header, "AdamWFacts") == adamw_tables.FACTS
    assert fields(header, "AdamWLimit") == adamw_tables.LIMITS
    assert constant(header, "kAdamWBlock") == adamw_tables.BLOCK
    assert constant(header, "kQuantised") == adamw_tables.QUANTISED
    names = [words(name) for name in enumerators(header, "Rounding")]
    assert tuple(names) == adamw_tables.ROUNDINGS
    moments = {"kFloat32": "fp32", "kBFloat16": "bf16", "k8Bit": "8bit"}
    assert tuple(moments[name] for name in enumerators(header, "Moments")) == adamw_tables.MOMENTS
    for name in ("Rounding", "Moments"):
        assert list(enumerators(header, name).values()) == list(
            range(len(enumerators(header, name)))
        )


def test_formats_of_adamw() -> None:
    header = COMMON / "adamw.h"
    purposes = {"kWeightBits": "WEIGHT_BITS", "kExpAvgBits": "EXP_AVG_BITS"}
    purposes["kExpAvgSqBits"] = "EXP_AVG_SQ_BITS"
    found = enumerators(header, "BitsPurpose")
    assert found == {key: getattr(adamw_tables, name) for key, name in purposes.items()}
    assert constant(header, "kCodeShift") == adamw_tables.CODE_SHIFT
    assert constant(header, "kLowestCode", Signed=1) == adamw_tables.SIGNED_LOWEST
    assert constant(header, "kLowestCode", Signed=0) == adamw_tables.UNSIGNED_LOWEST


def test_philox() -> None:
    header = COMMON / "philox.h"
    names = ("Multiplier0", "Multiplier2", "KeyStep0", "KeyStep1")
    numbers = [constant(header, f"kPhilox{name}") for name in names]
    kernel = KERNELS / "philox.py"
    in_order = [n for n in literals(kernel, "philox_words") if n > 2**16]
    assert in_order == numbers
    rounds = re.search(r"PHILOX_ROUNDS = tl.constexpr\((\d+)\)", kernel.read_text())
    assert rounds and int(rounds[1]) == constant(header, "kPhiloxRounds")
    reference = literals(ROOT / "fasttune/ops/_dropout.py", "_philox")
    assert [n for n in reference if n > 2**16] == numbers
    assert constant(header, "kPhiloxRounds") in reference


def test_limits_of_a_group_of_lora_branches() -> None:
    header, tables = CUDA / "lora.cuh", (KERNELS / "lora_tables.py").read_text()
    limits = re.search(r"GROUP_BRANCHES, GROUP_RANKS = (\d+), (\d+)", tables)
    assert limits is not None
    found = [constant(header, name) for name in ("kGroupBranches", "kGroupRanks")]
    assert found == [int(limit) for limit in limits.groups()]
    assert found == [lora_cuda._GROUP_BRANCHES, lora_cuda._GROUP_RANKS]


def test_codes_of_dtypes_and_activations() -> None:
    dtypes = enumerators(COMMON / "dtype.h", "DType")
    assert {getattr(torch, words(k).replace("_", "")): v for k, v in dtypes.items()} == DTYPE_CODES
    header = COMMON / "activation.h"
    listed = re.search(r"kActivationNames\[\] = {([^}]*)}", code_of(header))
    assert listed is not None
    names = re.findall(r'"(\w+)"', listed[1])
    codes = {words(name): code for name, code in enumerators(header, "Activation").items()}
    assert codes == {name: code for code, name in enumerate(names)}
    assert names == list(ACTIVATIONS)


@pytest.mark.parametrize("struct", ["Gelu", "GeluTanh", "QuickGelu", "LeakyRelu"])
def test_numbers_of_activations(struct: str) -> None:
    code = code_of(CUDA / "activation.cuh")
    body = code.split(f"struct {struct} {{")[1].split("\n};")[0]
    numbers = {name: value_of(text) for name, text in expressions(body).items()}
    scale, cubic = numbers.get("kScale", 0.0), numbers.get("kCubic", 0.0)
    wanted = {
        "Gelu": lambda: [numbers["kDensityAtZero"]],
        "GeluTanh": lambda: [scale, scale * cubic, scale, 3 * scale * cubic],
        "QuickGelu": lambda: [scale, scale],
        "LeakyRelu": lambda: [numbers["kSlope"], numbers["kSlope"]],
    }[struct]()
    written = literals(KERNELS / "activations.py", "activate_with_slope")
    for number in wanted:
        assert float(np.float32(number)) in written, (struct, number)
