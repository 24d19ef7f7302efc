# `make demo` and `make test` set up everything on a fresh machine: a virtual environment in .venv, then run.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SOURCES := deconvviz tests benchmarks docs examples

.PHONY: demo test test-all lint docs bench

$(VENV)/ready: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable ".[demo,test]"
	touch $@

demo: $(VENV)/ready
	$(RUN) -m deconvviz demo --out demo_out

test: $(VENV)/ready
	$(RUN) -m pytest

test-all: $(VENV)/ready
	$(RUN) -m pytest -m ""

lint: $(VENV)/ready
	$(RUN) -m ruff check $(SOURCES)
	$(RUN) -m ruff format --check $(SOURCES)
	$(RUN) -m mypy

$(VENV)/docs-ready: $(VENV)/ready
	$(RUN) -m pip install --quiet --editable ".[docs]"
	touch $@

docs: $(VENV)/docs-ready
	$(RUN) -m sphinx -W --keep-going -n -q docs docs/_build/html
	@echo open docs/_build/html/index.html

bench: $(VENV)/ready
	for script in recording project_feature_maps; do $(RUN) benchmarks/$$script.py || exit 1; done
