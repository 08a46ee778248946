# make demo: from nothing to a trained, evaluated nano model and its report.
# make test: the test suite (5 minutes on two cores). make check: what a commit must pass.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# PyTorch's CPU index gives a small build; unset TORCH_INDEX to take the default one (GPU).
TORCH_INDEX ?=

.PHONY: demo install test check format clean

$(BIN)/phiforge: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(TORCH_INDEX),$(BIN)/pip install --quiet torch --index-url $(TORCH_INDEX))
	$(BIN)/pip install --quiet --editable .
	touch $@

install: $(BIN)/phiforge

$(BIN)/pytest: $(BIN)/phiforge
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/phiforge run nano

test: $(BIN)/pytest
	$(BIN)/python -m pytest -m 'not slow and not browser'

check: $(BIN)/pytest
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest tests/test_imports.py

format: $(BIN)/pytest
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
