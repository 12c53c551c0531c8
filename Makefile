# `make demo` and `make test` need Python 3.11+ and make; each makes its environment in .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all test-oldest lint clean

demo: $(VENV)/.installed
	$(BIN)/sovit demo --workers 2

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadfile

# the slow ones one by one: they start workers, servers or a browser, and kill them
test-all: test
	$(BIN)/python -m pytest -m slow

# with the oldest versions that pyproject.toml allows
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sovit needs Python 3.11 or later; run make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(OLDEST)/.installed: pyproject.toml .ci/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint .ci/oldest.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) demo
