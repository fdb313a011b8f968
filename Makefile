PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?= smollm2-135m
PROMPT ?= Why is the sky blue? Answer in two sentences.

.PHONY: run install test lint bench clean
.DEFAULT_GOAL := run

run: install
	$(BIN)/edgert pull $(MODEL)
	$(BIN)/edgert run $(MODEL) "$(PROMPT)"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("edgert needs Python 3.11 or newer; name one: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	@echo "Building ggml's kernels for this machine; the first time takes several minutes."
	$(BIN)/python -m pip install -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	GGML_NO_BACKTRACE=1 $(BIN)/python -m pytest $(TESTS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
