# perdure: everything happens in .venv; Python 3.11 or later and make are all that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := --constraint constraints.txt --editable '.[dev,docs]'

# Settings of the shell that called make must not reach into .venv, nor keep byte code from being written.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint docs docs-serve tables measure clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1	\2/p' Makefile

setup: $(STAMP) ## install into .venv, again only when pyproject.toml or constraints.txt changed

demo: setup ## continual, federated and private learning on real digits; ends with runs/demo/report.html
	$(BIN)/perdure demo

# Every test uses one thread, so the files are shared out over the cores. A worker needs up to 1.5 GB: four at most.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: setup ## every behaviour, without the deep tests; the aim is 10 minutes on two cores
	$(PYTEST) -m 'not deep'

test-all: setup ## all tests, also those that are deep: kills, builds, parity, whole runs; the aim is 45 minutes
	$(PYTEST)

# The last line only reports a missing or stale row of the README's table; it does not fail for it.
lint: setup ## ruff, mypy, and whether the installed packages fit together
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pip check
	@$(BIN)/python tests/helpers/typed_list.py  # only reports
	@$(BIN)/python -m perdure.experiment.tables --report

# Material warns at every build of its end of life in May 2027.
docs: setup ## build the documentation into build/site; a broken link or a missing reference fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

docs-serve: setup ## show the documentation at http://127.0.0.1:8000, and again after every change
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

tables: setup ## write the README's table of strategies, and the tables of benchmarks from the stored rows
	$(BIN)/python -m perdure.experiment.tables
	$(BIN)/python benchmarks/tables.py

measure: setup ## shape of the code and breaches of plain English: functions, comments, docstrings, names
	$(BIN)/python benchmarks/measure.py
	$(BIN)/python benchmarks/plain_english.py

clean: ## remove .venv, builds and caches; runs/ stays
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src strategies benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# uv takes a minute where pip takes several; pip is there for when uv cannot be had or does not know the index in use.
# Avalanche and torch hold thousands of modules: without byte code every start takes half a minute.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("perdure needs Python 3.11 or later; $(PYTHON) is %d.%d; use make PYTHON=..." % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv --clear $(VENV)
	{ $(BIN)/python -m pip install --quiet --constraint constraints.txt uv \
	  && $(BIN)/uv pip install --python $(BIN)/python --build-constraints constraints.txt --compile-bytecode $(INSTALL); } \
	|| $(BIN)/python -m pip install $(INSTALL)
	@touch $@
