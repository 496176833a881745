"""Which nvcc builds fasttune._cuda, and the wheels that bring one where there is none.

FASTTUNE_CUDA=auto (the default) takes an nvcc that is there, 1 insists on one, 0 takes none.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = 13
# A complete nvcc in wheels of one release, whose dependencies pin none, and a file of each, below
# nvidia/cu13: torch or the user may have installed some of them.
WHEELS = {
    "nvidia-cuda-nvcc": "bin/nvcc",
    "nvidia-nvvm": "nvvm/bin/cicc",
    "nvidia-cuda-crt": "include/crt/host_config.h",
    "nvidia-cuda-runtime": "lib/libcudart_static.a",
    "nvidia-cuda-cccl": "include/cccl/nv/target",
}
REQUIREMENTS = [f"{name}=={OLDEST}.0.*" for name in WHEELS]


def wanted() -> str:
    """The value of FASTTUNE_CUDA.

    Raises:
        SystemExit: it is no known value.
    """
    value = os.environ.get("FASTTUNE_CUDA", "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"FASTTUNE_CUDA: expected auto, 0 or 1, got {value!r}")
    return value


def _outdated(nvcc: Path) -> str | None:
    """Why ``nvcc`` is not recent enough, or None."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = said.split("release ")[1].split(",")[0]
    if int(release.split(".")[0]) >= OLDEST:
        return None
    return f"{nvcc} is release {release}, and {OLDEST}.0 or later is needed"


def find() -> tuple[Path | None, str]:
    """The first nvcc that can build _cuda, of PATH, CUDA_HOME and the wheels, and why the others
    cannot."""
    if sys.platform != "linux":
        return None, "it is built on Linux only"
    home, on_path = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    toolkits = [Path(on_path)] if on_path else []
    toolkits += [Path(home) / "bin/nvcc"] if home else []
    reasons = []
    for nvcc in toolkits:
        if os.access(nvcc, os.X_OK):
            reason = _outdated(nvcc)
            if reason is None:
                return nvcc, ""
            reasons.append(reason)
    namespace = importlib.util.find_spec("nvidia")
    for place in (namespace.submodule_search_locations or []) if namespace else []:
        root = Path(place) / f"cu{OLDEST}"
        missing = [name for name, file in WHEELS.items() if not (root / file).exists()]
        if not missing:
            return root / "bin/nvcc", ""
        if "nvidia-cuda-nvcc" not in missing:
            reasons.append(f"{root}/bin/nvcc lacks {', '.join(missing)}")
    nowhere = "nvcc was not found on PATH, in CUDA_HOME or in the nvidia-cuda-nvcc wheel"
    return None, "; ".join(reasons) or nowhere


def choose() -> Path | None:
    """The nvcc that builds _cuda, or None, said on stdout, if _cuda is not to be built.

    Raises:
        SystemExit: FASTTUNE_CUDA is no known value, or insists where no nvcc can do it.
    """
    value = wanted()
    if value == "0":
        return None
    nvcc, reason = find()
    if nvcc is None and value == "1":
        install = " ".join(f"'{requirement}'" for requirement in REQUIREMENTS)
        raise SystemExit(f"FASTTUNE_CUDA=1: {reason}; pip install {install} brings one")
    if nvcc is None:
        print(f"fasttune: built without CUDA C++ kernels: {reason}")
    return nvcc


def build_requirements() -> list[str]:
    """The wheels that an isolated build needs: where FASTTUNE_CUDA=1 insists, there are wheels for
    the platform, and no nvcc is found."""
    served = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    return REQUIREMENTS if wanted() == "1" and served and find()[0] is None else []
