"""Builds fasttune._cpu: torch-free C++, the kernels once per instruction set, in parallel."""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
ONCE = ["csrc/cpu/isa.cpp", "csrc/bind_cpu.cpp"]
KERNELS = sorted(
    path
    for path in (str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp"))
    if path not in ONCE
)
# Plain is the baseline of the platform; the others are picked at run time by csrc/cpu/isa.cpp.
ISA_FLAGS: dict[str, list[str]] = {"plain": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        *("-mfma", "-mf16c", "-mprefer-vector-width=512"),
    ]
    ISA_FLAGS["avx512bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]


class BuildExt(build_ext):
    """Compiles each kernel source once per instruction set, with the namespace as a macro."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        if sys.platform == "win32":
            raise SystemExit("fasttune does not build on Windows: use Linux, macOS or WSL 2")
        # Kernels run inside torch's OpenMP runtime, bound when the module loads (_native.py): a
        # second runtime would fight torch's threads. So compile with OpenMP, link without it.
        openmp = ["-fopenmp"] if sys.platform == "linux" else []
        common = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wno-psabi", *openmp]
        common += ["-ffp-contract=fast", "-Wno-unknown-pragmas"]
        x86 = [("FASTTUNE_X86_BUILDS", "1")] if "avx2" in ISA_FLAGS else []
        includes = [*ext.include_dirs, str(ROOT / "csrc"), str(ROOT / "csrc/cpu")]
        temp = Path(self.build_temp)

        def compile_one(job: tuple[str, str, list[str]]) -> list[str]:
            source, isa, flags = job
            return self.compiler.compile(
                [source],
                output_dir=str(temp / isa),
                macros=[("FASTTUNE_ISA", isa), *x86],
                include_dirs=includes,
                extra_postargs=[*common, *flags],
                debug=False,
            )

        jobs = [(source, isa, flags) for isa, flags in ISA_FLAGS.items() for source in KERNELS]
        jobs += [(source, "once", []) for source in ONCE]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for names in pool.map(compile_one, jobs) for name in names]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            target_lang="c++",
            extra_postargs=["-Wl,-undefined,dynamic_lookup"]
            if sys.platform == "darwin"
            else ["-s"],
        )


setup(
    ext_modules=[Pybind11Extension("fasttune._cpu", [*KERNELS, *ONCE])],
    cmdclass={"build_ext": BuildExt},
)
