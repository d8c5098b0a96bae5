# The two commands of the README are `make demo` and `make test`. `make env` builds .venv with everything they need;
# it runs again only when pyproject.toml changes, never because a source file did.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SHELL  := /bin/bash

.DEFAULT_GOAL := help
.PHONY: help env demo test check slow mutants bench format lint types layers clean

help:            ## list the targets
	@grep -E '^[a-z]+: .*##|^[a-z]+:  *##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env: $(STAMP)    ## create .venv and install everything

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fedchorus needs Python 3.11 or newer; found $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch>=2.8,<2.14'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,ray,llm,minilm,onnx,tensorboard,dev]'
	@touch $@

demo: env        ## one federation of five hospitals on this machine
	@$(BIN)/fedchorus simulate hospitals

test: env        ## the default test suite
	@$(BIN)/python -m pytest

slow: env        ## the tests that take minutes
	@$(BIN)/python -m pytest -m slow

mutants: env     ## break the secure sum in fifty ways and see that its tests notice
	@$(BIN)/python tests/privacy/secagg/mutants.py

bench: env       ## every benchmark, both sides in one run
	@for b in $(filter-out benchmarks/measure.py,$(wildcard benchmarks/*.py)); do echo "== $$b"; $(BIN)/python $$b || exit 1; done

format: env      ## rewrite the sources in the project's format
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: env
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

types: env
	@$(BIN)/mypy

layers: env
	@$(BIN)/lint-imports

check: lint types layers test   ## format, lint, types, layers, tests

clean:           ## remove the environment and every cache
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
