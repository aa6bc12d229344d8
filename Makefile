# `make test` and `make demo` need only Python >= 3.11 and a package index. EXTRAS=dev,parity adds
# torch, transformers and peft, and the tests that compare with them; without, they are skipped.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
TESTS ?= not slow
JOBS ?= 2
BIN := $(VENV)/bin

.PHONY: install test test-slow lint demo clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lbw_optax needs Python 3.11 or newer; pass one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n $(JOBS) --dist loadfile --durations=10 -m '$(TESTS)'

test-slow: install
	$(BIN)/pytest -n $(JOBS) --dist loadfile -m slow

demo: install
	$(BIN)/python -m train.demo

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
