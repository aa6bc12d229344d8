# `make test` and `make demo` need only Python >= 3.11 and a package index. GROUPS='dev parity' adds
# torch, transformers and peft, and the tests that compare with them; without, they are skipped.
PYTHON ?= python3
VENV ?= .venv
GROUPS ?= dev
TESTS ?= not slow
PATHS ?=
JOBS ?= 2
BIN = $(VENV)/bin
# What is never imported is never compiled: half of the time that an installation takes.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
IN_GROUPS = $(foreach group,$(1),--group $(group))
# The lowest versions of what the wheel or its extra needs: "jax>=0.9" becomes "jax==0.9".
LOWEST = $(shell $(PYTHON) -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*(d.replace('>=', '==') for d in project$(1)))")
# The tests of the core that take no more than two minutes.
CORE := tests/law tests/test_guard.py tests/test_activations.py tests/test_audit.py tests/test_audit_log.py tests/test_callback.py tests/test_orders.py tests/test_qk_clip.py tests/test_state.py tests/test_frozen.py tests/test_testing.py tests/exporters \
  lbw_optax --ignore=lbw_optax/rollback
# And of the rollback, likewise.
ROLLBACK := tests/rollback/test_tiers.py tests/rollback/test_verdict.py

.PHONY: install test test-slow test-oldest lint docs demo clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lbw_optax needs Python 3.11 or newer; pass one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'  # the first that knows dependency groups
	$(PIP) --editable '.[rollback]' $(call IN_GROUPS,$(GROUPS))
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n $(JOBS) --dist loadfile --durations=40 -m '$(TESTS)' $(PATHS)

test-slow: install
	$(BIN)/pytest -n $(JOBS) --dist loadfile -m slow

# The core on the lowest versions; fails too where less of it is covered than pyproject.toml says.
# Then the rollback on the lowest Orbax, which replaces the one that the tests' Flax brings.
test-oldest: VENV := .venv-oldest
test-oldest:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'
	$(PIP) $(call LOWEST,['dependencies']) --editable . --group test
	$(BIN)/pytest -n $(JOBS) --dist loadfile --cov=lbw_optax --cov-report=term-missing:skip-covered $(CORE)
	$(PIP) $(call LOWEST,['optional-dependencies']['rollback'])
	$(BIN)/pytest -n $(JOBS) -m 'not slow and not process' $(ROLLBACK)

docs: VENV := .venv-docs
docs:
	$(MAKE) install VENV=$(VENV) GROUPS=docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs docs/_build/html

demo: install
	$(BIN)/python -m train.demo

clean:
	rm -rf $(VENV) .venv-docs .venv-oldest docs/_build .mypy_cache .pytest_cache .ruff_cache
