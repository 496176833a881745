"""Compiles CUDA C++ with g++ against csrc/emulator and runs it: docs/cuda_on_the_host.md."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

# Not -O2: vectorised code would hide in one wide access what a GPU's threads do one by one.
_FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-DFASTTUNE_EMULATE", "-Wall", "-Wno-attributes"]
# Or libraries in one process would share the static shared memory of templates with external names.
_FLAGS += ["-fno-gnu-unique"]
# The runtime answers the checks itself, so the flags are given to the compiler, not the linker.
_CHECKS = [
    "-fsanitize=thread",
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "-fsanitize-recover=all",
    "--param=tsan-instrument-func-entry-exit=0",
]


class EmulatorError(RuntimeError):
    """A kernel did what CUDA does not allow; the message names the place and the thread."""


def compiler_missing() -> str | None:
    """Why kernels cannot be compiled for the host, or None."""
    return None if shutil.which("g++") else "the CUDA emulator needs g++, which is not on PATH"


def build(sources: Sequence[Path], csrc: Path, macros: Sequence[str] = ()) -> Path:
    """Compile ``sources`` and the emulator's runtime into a shared library.

    Libraries are kept in the temporary directory under a hash of everything that went in.

    Args:
        sources: the .cu files.
        csrc: the directory that holds ``emulator`` and ``cuda``.
        macros: names to define, or ``NAME=VALUE``.

    Raises:
        RuntimeError: g++ refused a source; the message holds what it said.
    """
    inputs = sorted(
        {*sources, *csrc.glob("emulator/*"), *csrc.glob("cuda/*"), *csrc.glob("common/*")}
    )
    digest = hashlib.sha256(repr((macros, _FLAGS, _CHECKS)).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    cache = Path(tempfile.gettempdir()) / f"fasttune-cuda-on-host-{os.getuid()}"
    cache.mkdir(exist_ok=True, mode=0o700)
    library = cache / f"{sources[0].stem}-{digest.hexdigest()[:16]}.so"
    with _alone(library):
        if not library.exists():
            _compile(sources, csrc, macros, library)
    return library


@contextlib.contextmanager
def _alone(library: Path) -> Iterator[None]:
    """One process at a time makes a library; the others wait for it."""
    with open(f"{library}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(sources: Sequence[Path], csrc: Path, macros: Sequence[str], library: Path) -> None:
    defines = [f"-D{name}" for name in macros]
    with tempfile.TemporaryDirectory() as directory:

        def compile_one(job: tuple[int, Path]) -> str:
            index, path = job
            name = f"{directory}/{index}.o"
            checks = _CHECKS if path.suffix == ".cu" else []
            options = [*_FLAGS, *checks, *defines, f"-I{csrc}"]
            _run("g++", *options, "-x", "c++", "-c", path, "-o", name)
            return name

        jobs = enumerate([*sources, *sorted(csrc.glob("emulator/*.cpp"))])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        _run("g++", "-shared", *objects, "-ldl", "-o", f"{directory}/library.so")
        shutil.copy(f"{directory}/library.so", f"{library}.{os.getpid()}")
        os.replace(f"{library}.{os.getpid()}", library)


def _run(*command: str | Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr}")


class Kernels:
    """The launchers of a library that :func:`build` made.

    Args:
        library: the shared library.
    """

    def __init__(self, library: Path) -> None:
        self._path = str(library)
        self._library = ctypes.CDLL(self._path)
        self._library.emulator_error.restype = ctypes.c_char_p

    def __call__(
        self, launcher: str, *args: Any, seed: int = 0, reachable: Sequence[Tensor] = ()
    ) -> None:
        """Run a launcher; the kernel may touch the tensors it is given and nothing else.

        Args:
            launcher: the name of an ``extern "C"`` function.
            args: tensors (their addresses are passed), None (a null pointer), integers (int64),
                floats (float) and whatever else ctypes takes.
            seed: of the order of threads and blocks; 0 keeps them in order.
            reachable: tensors whose addresses stand in a table.

        Raises:
            EmulatorError: the kernel broke a rule of CUDA.
        """
        self._run(getattr(self._library, launcher), map(_as_c, args), seed, (*args, *reachable))

    def _run(
        self, function: Callable[..., Any], given: Iterable[Any], seed: int, buffers: Sequence[Any]
    ) -> None:
        self._library.emulator_begin(ctypes.c_uint(seed))
        self._library.emulator_forget_buffers()
        for arg in buffers:
            if isinstance(arg, Tensor) and arg.numel():
                skipped = arg.storage_offset() * arg.element_size()
                extent = int(arg.untyped_storage().nbytes() - skipped)
                self._library.emulator_add_buffer(
                    ctypes.c_void_p(arg.data_ptr()), ctypes.c_size_t(extent)
                )
        function(*given)
        message = self._library.emulator_error().decode()
        if message:
            raise EmulatorError(re.sub(r"\{(0x[0-9a-f]+)\}", self._source_line, message))

    def _source_line(self, offset: re.Match[str]) -> str:
        if shutil.which("addr2line") is None:
            return offset[0]
        command = ["addr2line", "-e", self._path, offset[1]]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return found.split(" (")[0].strip()


class Extension(Kernels):
    """``fasttune._cuda`` on the emulator: bind_cuda.cpp and all kernels, compiled for the host.

    Args:
        csrc: the directory that holds ``bind_cuda.cpp``, ``emulator`` and ``cuda``.
    """

    def __init__(self, csrc: Path) -> None:
        kernels = build(sorted(csrc.glob("cuda/*.cu")), csrc)
        super().__init__(kernels)
        path = _bind(csrc, kernels)
        spec = importlib.util.spec_from_file_location("_cuda", path)
        assert spec is not None and spec.loader is not None
        self._module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._module)

    def launch(self, name: str, *args: Any, reachable: Sequence[Tensor] = ()) -> None:
        """In place of ``fasttune._native._cuda.launch``; threads and blocks in a random order."""
        given = [arg.data_ptr() if isinstance(arg, Tensor) else arg or 0 for arg in args]
        function = getattr(self._module, name)
        self._run(function, [*given, 0], seed=1 + len(args), buffers=(*args, *reachable))


def _bind(csrc: Path, kernels: Path) -> Path:
    """The extension module of ``kernels``: a library of its own, because the emulator takes all
    thread-local storage of the kernels' library, pybind11's too, for shared memory."""
    import pybind11

    source = csrc / "bind_cuda.cpp"
    digest = hashlib.sha256(source.read_bytes() + str((kernels, pybind11.__version__)).encode())
    module = kernels.with_name(
        f"_cuda-{digest.hexdigest()[:16]}{sysconfig.get_config_var('EXT_SUFFIX')}"
    )
    with _alone(module):
        if not module.exists():
            partial = module.with_name(f"{module.name}.{os.getpid()}")
            includes = (csrc, pybind11.get_include(), sysconfig.get_path("include"))
            options = [*_FLAGS, '-DFASTTUNE_CUDA_TARGETS="the emulator"', "-fvisibility=hidden"]
            options += [f"-I{path}" for path in includes]
            _run(
                "g++",
                *options,
                "-shared",
                source,
                kernels,
                f"-Wl,-rpath,{kernels.parent}",
                "-o",
                partial,
            )
            os.replace(partial, module)
    return module


def _as_c(arg: Any) -> Any:
    if arg is None:
        return ctypes.c_void_p(None)
    if isinstance(arg, Tensor):
        return ctypes.c_void_p(arg.data_ptr())
    if isinstance(arg, int):
        return ctypes.c_int64(arg)
    return ctypes.c_float(arg) if isinstance(arg, float) else arg
