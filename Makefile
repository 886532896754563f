# Hocket. `make help` lists what there is; every target sets up what it needs.
SHELL := /bin/bash
PYTHON ?= python3
TORCH_SPEC ?= torch==2.13.0
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1
# uv does not read pip's configuration; this hands it the folder of local wheels, where there is one.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
STAMP := $(VENV)/.set-up
COMPILED := $(VENV)/.compiled
PLANNER := control/scheduler/policies/hocket
CODE := hocket gateway control gpuworker bench tests tools

.DEFAULT_GOAL := help
.PHONY: help setup demo up test test-full lint types proto bench bench-gpu profile clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) $(COMPILED)  ## makes .venv with everything (TORCH_SPEC=… for another torch build)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Hocket needs Python 3.11 or newer: make PYTHON=/path/to/python3 …"; exit 1; }
	@test -x $(BIN)/python || { echo "setting up 1/3: $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "setting up 2/3: torch and the rest (1.5 GB unpacked; 1 to 3 minutes the first time)"
	@if command -v uv >/dev/null; then \
	  export UV_COMPILE_BYTECODE=1 VIRTUAL_ENV=$(CURDIR)/$(VENV); \
	  uv pip install "$(TORCH_SPEC)" && uv pip install -e ".[dev]"; \
	else \
	  PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pip install -q "$(TORCH_SPEC)" && \
	  PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pip install -q -e ".[dev]"; \
	fi
	@if command -v nvidia-smi >/dev/null; then $(BIN)/python -m pip install -q -e ".[cuda]"; fi
	@touch $@

# From nothing each time: the compiler's cache does not see that a function in another file changed.
$(COMPILED): $(STAMP) $(shell grep -l njit $(PLANNER)/*.py)
	@echo "setting up 3/3: compiling the planner (10 to 30 s, only when it changed)"
	@rm -f $(PLANNER)/__pycache__/*.nbi $(PLANNER)/__pycache__/*.nbc
	@$(BIN)/python -m control.scheduler.warm
	@touch $@

demo: setup  ## the whole mesh on this machine; makes a video and pictures at three sizes, then stops
	@hocket demo

up: setup  ## the whole mesh on this machine, until Ctrl-C
	@hocket up --listen 127.0.0.1:50051

test: setup  ## all tests
	@python -m pytest

test-full: setup  ## all tests, and every family in every layout, batch and schedule
	@python -m pytest -m ''

lint: setup  ## style, import contracts, protobuf lint
	@ruff check . && ruff format --check . && lint-imports && python tools/contract.py lint && \
	if git rev-parse -q --verify main >/dev/null; then python tools/contract.py breaking main; fi

types: setup  ## mypy --strict
	@mypy

proto: setup  ## regenerates hocket/v1 from proto/
	@python tools/generate_stubs.py

bench: setup  ## the mesh against the plain diffusers loop, groups, transfers, admission
	@python -m bench mesh

bench-gpu: setup  ## on a GPU host: steps, NCCL, layouts, a mesh (ARGS=--tiny on a CPU)
	@python -m bench gpu $(ARGS)

profile: setup  ## measures this machine's step times of the embedded model: profile.csv
	@python -m gpuworker profile hocket-emoji --output profile.csv

clean:  ## removes what was made here, .venv included
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +  # the compiled planner, too
	rm -rf $(VENV) state out .pytest_cache .mypy_cache .ruff_cache
