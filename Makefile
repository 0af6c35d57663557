# Every target creates its own environment in .venv (Python 3.11 or 3.12).
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help install demo test test-gpu lint format clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 found: install one, or name it: make PYTHON=/path/to/python3.11 …"; exit 1; }
	@echo "Creating .venv with $$($(PYTHON) --version) (several minutes on a slow network)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,plot]'
	@touch $@

install: $(READY) ## create .venv and install the project with its development tools

demo: $(READY) ## train, compress, publish, serve and measure a small zoo of fine-tunes
	@$(BIN)/deltazip demo $(ARGS)

test: $(READY) ## run the tests (≤ 15 minutes on 2 cores)
	$(BIN)/pytest -m "not gpu" -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

test-gpu: $(READY) ## run the tests of kernels, compressor and engine on a CUDA device
	$(BIN)/pytest tests/kernels $(ARGS)
	$(BIN)/pytest -m gpu tests/integration $(ARGS)

lint: $(READY) ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## rewrite the code as ruff formats it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
