# Two commands from a bare clone: `make demo` and `make test`. Both make the virtual environment they need.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed
# The interpreter of Triton 3.6, which torch 2.11 brings, breaks with NumPy 2.4.
OLDEST = torch==2.11.0 torchvision==0.26.0 "numpy<2.4"
CONSTRAINTS ?=
# pytest's processes; each test has one core to itself, or threads of two would wait for each other.
JOBS ?= 2
# The command, not the module: `python -m` puts this folder on the path, where transformers takes kernels/ for another package.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(JOBS)
# Options of the demonstration, such as DEMO="--epochs 5".
DEMO ?=
# Folder of make gpu's results; unset, bench/results/<device>.
RESULTS ?=
# Seconds that the tests of make gpu may take, tuning (half as many), benchmarks of operators (as many) and of networks
# (half as many again); with these, it ends within eight minutes.
GPU_SECONDS ?= 100
# What make sanitize runs: a kernel in it takes tens of times as long.
SANITIZE ?= tests/kernels -k "empty_batch or layouts_of_input or mixed_dtypes or strided_weights"

# Words of the faults that make mutants plants; unset, all of them.
MUTANTS ?=

.PHONY: help install demo test tests test-oldest lint kernels fuzz candidates mutants gpu sanitize clean

help:
	@echo "make demo         train SE-ResNet-20 and its plain twin on real digits, draw their curves (minutes on two cores)"
	@echo "make test         everything that needs no GPU: lint, types, kernels in Triton's interpreter, training, packaging"
	@echo "make test-oldest  the same on torch 2.11, the oldest supported, but lint and types"
	@echo "make fuzz         10,000 generated SE programs, rewritten and compared with eager PyTorch"
	@echo "make candidates   every candidate of the autotuner in the interpreter, its memory and its schedules checked (half an hour)"
	@echo "make mutants      plant faults one at a time and see that tests fail (minutes; MUTANTS=\"words of some\")"
	@echo "make gpu          on a machine with a GPU: tests on it, then benchmarks into bench/results/<device>/"
	@echo "make sanitize     on a machine with an NVIDIA GPU: some kernel tests in compute-sanitizer's memcheck and racecheck"
	@echo "make clean        remove the environments and everything made here"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@echo "== making $(VENV) and installing (torch is 5 GB: minutes on a fast line)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# setuptools warns of every editable install whose folders are mapped, as kernels/, models/ and bench/ are here.
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable ".[dev]"
	@touch $@

demo: $(INSTALLED)
	@echo "== training two networks on real images; results go to out/demo"
	$(BIN)/python -m setriton demo $(DEMO)

test: lint tests

tests: kernels
	@echo "== reference path, networks, training under torchrun, command line, packaging"
	$(PYTEST) tests --ignore tests/kernels --benchmark-disable

kernels: $(INSTALLED)
	@echo "== kernels, in Triton's interpreter on the CPU"
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels

lint: $(INSTALLED)
	@echo "== ruff and mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without lint: torch's own types differ between releases, and the newest one's are the ones to fit.
test-oldest:
	$(MAKE) tests VENV=.venv-oldest CONSTRAINTS='$(OLDEST)'

fuzz: $(INSTALLED)
	@echo "== 10,000 generated programs against eager PyTorch; SETRITON_SEED chooses others"
	SETRITON_PROGRAMS=$${SETRITON_PROGRAMS:-10000} $(PYTEST) -rP tests/compile/test_generated.py

candidates: $(INSTALLED)
	@echo "== every candidate that setriton tune may try for the networks' shapes, scaled down, in the interpreter (half an hour on two cores)"
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels -m full_autotune

mutants: $(INSTALLED)
	@echo "== faults of tests/mutants.toml, each planted in a copy of the tree: their tests must fail"
	$(BIN)/python -P tests/support/mutants.py $(MUTANTS)

# A machine lent for its GPU often has torch and no package index: then its own Python serves, and hubconf.py, which finds
# the package in a checkout, stands in for an installation.
HAS_TORCH = $(shell $(PYTHON) -c "import hypothesis, matplotlib, pytest, rich, torch; print(1)" 2>/dev/null)
GPU_PATH = PYTHONPATH=.:$$PYTHONPATH
GPU_EXECUTABLE = $(if $(HAS_TORCH),$(PYTHON),$(BIN)/python)
GPU_PYTHON = $(GPU_PATH) $(GPU_EXECUTABLE)
GPU_RESULTS = $(or $(RESULTS),$(shell $(GPU_PYTHON) -c "import hubconf; from setriton.bench import environment as e; \
	print(e.results_folder(e.environment()['device']))"))

.PHONY: gpu-machine gpu-tests gpu-tuning gpu-benchmarks gpu-models gpu-host

# One after another, whatever -j says, and each with a share of the time: run again, the benchmarks go on where they stopped.
gpu: gpu-machine
	@$(MAKE) --no-print-directory gpu-tests
	@$(MAKE) --no-print-directory gpu-tuning
	@$(MAKE) --no-print-directory gpu-benchmarks
	@$(MAKE) --no-print-directory gpu-models
	@$(MAKE) --no-print-directory gpu-host

gpu-machine:
	$(if $(HAS_TORCH),,@$(MAKE) --no-print-directory install)
	@$(GPU_PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu needs a GPU; torch sees none')"
	@echo "== this machine"
	@$(GPU_PYTHON) -c "import hubconf; from rich import print; from setriton.doctor import report; print(report())"

# timeout ends with 124 when it had to end the tests.
gpu-tests:
	@echo "== kernels and training on the GPU, for $(GPU_SECONDS) seconds at most"
	@$(GPU_PATH) timeout --signal INT --kill-after 20 $(GPU_SECONDS) $(GPU_EXECUTABLE) -m pytest -p hubconf \
		tests/kernels tests/train/test_gpu.py tests/bench/test_timing.py \
		|| { test $$? -eq 124 && echo "tests stopped in time: not all of them ran"; }

# Before the benchmarks, so that they time what tuning chose: into the checkout, from where it ships. A copy goes to RESULTS.
gpu-tuning:
	@echo "== tuning, for about $$(( $(GPU_SECONDS) / 2 )) seconds"
	@$(if $(RESULTS),mkdir -p "$(RESULTS)")
	@$(GPU_PYTHON) -c "import hubconf, shutil; from setriton.tune import run, shipped_file; \
		path = run(seconds=$(GPU_SECONDS) / 2, out=shipped_file()); print(path); \
		'$(RESULTS)' and path.exists() and shutil.copy(path, '$(RESULTS)/tuned.json')"

gpu-benchmarks:
	@echo "== benchmarks, for $(GPU_SECONDS) seconds"
	@$(GPU_PYTHON) -c "import hubconf; from pathlib import Path; from setriton.bench.ops import run; \
		print(*run(seconds=$(GPU_SECONDS), out=Path('$(GPU_RESULTS)')), sep='\n')"

# Compilers take most of it, and find in their caches what they compiled in an earlier run.
gpu-models:
	@echo "== networks, for about $$(( $(GPU_SECONDS) * 3 / 2 )) seconds"
	@$(GPU_PYTHON) -c "import hubconf; from pathlib import Path; from setriton.bench.models import run; \
		print(*run(seconds=$(GPU_SECONDS) * 3 / 2, out=Path('$(GPU_RESULTS)')), sep='\n')"

gpu-host:
	@echo "== what a call costs the host"
	@if $(GPU_PYTHON) -c "import pytest_benchmark" 2>/dev/null; then \
		mkdir -p "$(GPU_RESULTS)" && $(GPU_PYTHON) -m pytest -q -p hubconf tests/bench/test_host_overhead.py \
			--benchmark-columns=median,iqr,rounds --benchmark-json="$(GPU_RESULTS)/host_overhead.json"; \
	else echo "left out: pytest-benchmark is not installed"; fi

# On the path, beside nvcc, or in the wheels of CUDA and Triton.
SANITIZER = $(firstword $(shell command -v compute-sanitizer; \
	ls "$$(dirname "$$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")/compute-sanitizer" 2>/dev/null; \
	find $$($(GPU_PYTHON) -c "import sysconfig as s; print(*(s.get_path('purelib') + d for d in ('/nvidia', '/triton')))") \
		-name compute-sanitizer -type f 2>/dev/null))

# Memory of torch's cache counts as allocated as long as the cache has it, which would hide accesses out of bounds.
sanitize: gpu-machine
	@if [ -z "$(SANITIZER)" ]; then echo "left out: there is no compute-sanitizer on this machine"; exit; fi; \
	for tool in memcheck racecheck; do \
		echo "== $$tool"; \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(GPU_PATH) $(SANITIZER) --tool $$tool --error-exitcode 1 \
			$(GPU_EXECUTABLE) -m pytest -q -p hubconf $(SANITIZE) || exit 1; \
	done

clean:
	rm -rf .venv .venv-oldest build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
