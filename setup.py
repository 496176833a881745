"""Builds fasttune._cpu, torch-free C++, the kernels once per instruction set, in parallel; and
fasttune._cuda, CUDA C++ for every target, through ninja, where there is nvcc.

FASTTUNE_CUDA=0 leaves _cuda out, 1 insists on it, auto (the default) builds it if nvcc is found: on
PATH, in CUDA_HOME, or in the nvidia-cuda-nvcc wheel (csrc/nvcc.py). With 1, csrc/build_backend.py
brings the wheels of nvcc where there is none. FASTTUNE_EMULATED_AMX=1 adds a build of the kernels
for AMX that runs without AMX, for tests.
"""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, has_flag
from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc"))
import nvcc  # noqa: E402, a file of csrc

# The first takes longest.
ONCE = ["csrc/bind_cpu.cpp", "csrc/bind_lora_runs.cpp", "csrc/bind_bottleneck.cpp"]
ONCE += ["csrc/cpu/isa.cpp", "csrc/cpu/lora_runs.cpp"]
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

# Builds of a few kernels, on top of that of AVX-512: their flags and sources. The emulated one is
# for tests on CPUs without tiles.
ON_AVX512: dict[str, tuple[list[str], list[str]]] = {}
if "avx512" in ISA_FLAGS:
    bf16_dot = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
    attention = [source for source in KERNELS if "attention" in source]
    ON_AVX512["avx512bf16"] = bf16_dot, [*attention, "csrc/cpu/bf16_dot/table.cpp"]
    if sys.platform == "linux":
        tiles = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu/amx").glob("*.cpp"))
        ON_AVX512["amx"] = [*bf16_dot, "-mamx-tile", "-mamx-bf16"], tiles
        if os.environ.get("FASTTUNE_EMULATED_AMX") == "1":
            ON_AVX512["amxemulated"] = [*bf16_dot, "-DFASTTUNE_EMULATE_AMX"], tiles

CUDA_SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").glob("*.cu"))
# Compute capabilities with code of their own, by the PTX they are assembled from: the source is
# compiled once for each PTX. The last PTX, kept as well, serves what comes later.
CUDA_TARGETS = {75: (75,), 80: (80, 86, 89, 90, 100, 120)}


class BuildExt(build_ext):
    """Compiles each kernel source once per instruction set, with the namespace as a macro."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        if sys.platform == "win32":
            raise SystemExit("fasttune does not build on Windows: use Linux, macOS or WSL 2")
        if ext.name == "fasttune._cuda":
            self.build_cuda(ext)
        else:
            self.build_cpu(ext)

    def build_cuda(self, ext: Pybind11Extension) -> None:
        """One nvcc a source, as many at a time as ninja finds cores; nothing is compiled twice."""
        temp = (ROOT / self.build_temp / "cuda").resolve()
        temp.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [*ext.include_dirs, *self.include_dirs, str(ROOT / "csrc")]
        host = ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-std=c++17", "-O3"]
        # The wheels keep libcudart_static.a in lib, where nvcc looks in lib64.
        libraries = f"-L{NVCC.parent.parent / 'lib'}"
        kept = max(CUDA_TARGETS)
        device = [
            f"-gencode=arch=compute_{ptx},code=[{','.join(f'sm_{t}' for t in targets)}]"
            for ptx, targets in CUDA_TARGETS.items()
        ]
        device.append(f"-gencode=arch=compute_{kept},code=compute_{kept}")
        names = " ".join(f"sm_{t}" for targets in CUDA_TARGETS.values() for t in targets)
        flags = [*host, *(f"-I{path}" for path in dict.fromkeys(includes))]
        objects = {temp / (Path(source).stem + ".o"): source for source in ext.sources}
        lines = [
            f"nvcc = {NVCC}",
            "rule compile",
            f"  command = $nvcc {' '.join(flags)} $more -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $nvcc -shared --cudart static {libraries} -Xlinker -s $in -o $out",
        ]
        for path, source in objects.items():
            bind = not source.endswith(".cu")
            more = (
                f"'-DFASTTUNE_CUDA_TARGETS=\"{names}\"'"
                if bind
                else " ".join(f"'{flag}'" for flag in device)
            )
            lines += [f"build {path}: compile {ROOT / source}", f"  more = {more}"]
        lines += [f"build {target}: link {' '.join(map(str, objects))}", ""]
        (temp / "build.ninja").write_text("\n".join(lines))
        subprocess.run(["ninja", "-C", str(temp)], check=True)

    def build_cpu(self, ext: Pybind11Extension) -> None:
        # Kernels run inside torch's OpenMP runtime, bound when the module loads (_native.py): a
        # second runtime would fight torch's threads. So compile with OpenMP, link without it.
        openmp = ["-fopenmp"] if sys.platform == "linux" else []
        common = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wno-psabi", *openmp]
        # Python's own flags ask for debug information, a fifth of the time; linking drops it.
        common += ["-ffp-contract=fast", "-Wno-unknown-pragmas", "-g0"]
        partial = {  # GCC has tiles from 11 on
            isa: build
            for isa, build in ON_AVX512.items()
            if isa != "amx" or has_flag(self.compiler, "-mamx-bf16")
        }
        builds = {"FASTTUNE_X86_BUILDS": "avx2" in ISA_FLAGS}
        builds["FASTTUNE_AMX_BUILD"] = "amx" in partial
        builds["FASTTUNE_EMULATED_AMX_BUILD"] = "amxemulated" in partial
        x86 = [(name, "1") for name, there in builds.items() if there]
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

        jobs: list[tuple[str, str, list[str]]] = [(source, "once", []) for source in ONCE]
        jobs += [(source, isa, flags) for isa, flags in ISA_FLAGS.items() for source in KERNELS]
        jobs += [
            (source, isa, flags) for isa, (flags, sources) in partial.items() for source in sources
        ]
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


NVCC = nvcc.choose()
EXTENSIONS = [Pybind11Extension("fasttune._cpu", [*KERNELS, *ONCE])]
if NVCC is not None:
    EXTENSIONS.append(Pybind11Extension("fasttune._cuda", [*CUDA_SOURCES, "csrc/bind_cuda.cpp"]))

setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildExt})
