# Two commands from a bare clone: `make demo` and `make test`. Both make the virtual environment they need.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed
# The interpreter of Triton 3.6, which torch 2.11 brings, breaks with NumPy 2.4.
OLDEST = torch==2.11.0 torchvision==0.26.0 "numpy<2.4"
CONSTRAINTS ?=
# pytest's processes; each test has one core to itself.
JOBS ?= 2
# Options of the demonstration, such as DEMO="--epochs 5".
DEMO ?=
# Folder of make gpu's results; unset, bench/results/<device>.
RESULTS ?=
GPU_RESULTS = $(if $(RESULTS),__import__('pathlib').Path('$(RESULTS)'),None)

.PHONY: help install demo test test-oldest lint kernels gpu clean

help:
	@echo "make demo         train SE-ResNet-20 and its plain twin on real digits, draw their curves (minutes on two cores)"
	@echo "make test         everything that needs no GPU: lint, types, kernels in Triton's interpreter, training, packaging"
	@echo "make test-oldest  the same on torch 2.11, the oldest supported"
	@echo "make gpu          on a machine with a GPU: tests on it, then benchmarks into bench/results/<device>/"
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

test: lint kernels
	@echo "== reference path, networks, training under torchrun, command line, packaging"
	$(BIN)/python -m pytest tests --ignore tests/kernels --numprocesses $(JOBS)

kernels: $(INSTALLED)
	@echo "== kernels, in Triton's interpreter on the CPU"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels --numprocesses $(JOBS)

lint: $(INSTALLED)
	@echo "== ruff and mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS='$(OLDEST)'

# A machine lent for its GPU often has torch and no package index: then its own Python serves, and hubconf.py, which finds
# the package in a checkout, stands in for an installation.
HAS_TORCH = $(shell $(PYTHON) -c "import hypothesis, pytest, rich, torch; print(1)" 2>/dev/null)
GPU_PYTHON = PYTHONPATH=.:$$PYTHONPATH $(if $(HAS_TORCH),$(PYTHON),$(BIN)/python)

gpu:
	$(if $(HAS_TORCH),,@$(MAKE) --no-print-directory install)
	@$(GPU_PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu needs a GPU; torch sees none')"
	@echo "== this machine"
	$(GPU_PYTHON) -c "import hubconf; from rich import print; from setriton.doctor import report; print(report())"
	@echo "== kernels and training on the GPU"
	$(GPU_PYTHON) -m pytest -p hubconf tests/kernels tests/train/test_gpu.py
	@echo "== benchmarks"
	$(GPU_PYTHON) -c "import hubconf; from setriton.bench.ops import run; print(*run((32, 128), $(GPU_RESULTS)), sep='\n')"

clean:
	rm -rf .venv .venv-oldest build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
