# make venv      .venv with the tested versions and this package, editable
# make demo      train a small model, read real text three ways, print a table
# make test      all tests and their coverage; PYTEST_ARGS="-m 'not slow'" for some
# make bench     speed beside Inductor
# make lint      style, types and layers, as below
# make style     ruff: rules and format
# make types     mypy --strict
# make layers    imports go one way
# make format    repair style
# make clean     remove what building and testing leave; .venv stays
#
# Needs python3 (3.10 to 3.13), a C++ compiler, and the network when .venv is made.

PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements/cpu.txt
PYTEST_ARGS ?=

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
SOURCES := adaattn_compiler passes kernels
# The sources laid out as the wheel has them, for tools that read files instead of importing them.
LAYOUT := build/layout

.PHONY: help venv test lint style layout types layers format demo bench clean

help:
	@sed -n '1,/^$$/ s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP)

# Without dependencies and isolation, so that nothing but the pinned set is ever installed.
$(STAMP): $(REQUIREMENTS) pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r $(REQUIREMENTS)
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	touch $@

# `pytest`, not `python -m pytest`, which would put the root on sys.path (see pyproject.toml).
# Triton is either interpreted or compiled throughout a process: first the former.
test: $(STAMP)
	TRITON_INTERPRET=1 $(BIN)/pytest tests/interpreted --cov --cov-report= --cov-fail-under=0
	$(BIN)/pytest --cov --cov-append --cov-report=term $(PYTEST_ARGS)

lint: style types layers

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy and import-linter find modules by folder: they would take passes/ for a package `passes`, or
# miss it. They get a copy instead (keeping times, for mypy's cache), and mypy's messages get the
# true paths back.
layout:
	@rm -rf $(LAYOUT) && mkdir -p $(LAYOUT)
	@cp -Rp adaattn_compiler $(LAYOUT)/
	@cp -Rp passes kernels $(LAYOUT)/adaattn_compiler/

types: $(STAMP) layout
	cd $(LAYOUT) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache -p adaattn_compiler \
		| sed -E 's,^adaattn_compiler/(passes|kernels)/,\1/,'

layers: $(STAMP) layout
	cd $(LAYOUT) && $(abspath $(BIN))/lint-imports --config $(CURDIR)/pyproject.toml --no-cache --no-logo

demo: $(STAMP)
	$(BIN)/python examples/demo.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf build dist *.egg-info .coverage .coverage.* htmlcov
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(SOURCES) tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
