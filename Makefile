# make venv      .venv with the tested versions and this package, editable
# make demo      train a small model, read real text three ways, print a table
# make test      all tests and their coverage; PYTEST_ARGS="-m 'not slow'" for some
# make test-cuda-codegen
#                what the CUDA build of torch can be tested for without a GPU, in .venv-cuda (5 GB)
# make bench     speed beside Inductor
# make gpu-check on a machine with a GPU: tests and measurements there, in eight minutes
# make lint      style, types and layers, as below
# make style     ruff: rules and format
# make types     mypy --strict
# make layers    imports go one way
# make format    repair style
# make clean     remove what building and testing leave; .venv and .venv-cuda stay
#
# Needs python3 (3.10 to 3.13), a C++ compiler, and the network when .venv is made.

PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements/cpu.txt
CUDA_VENV ?= .venv-cuda
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
CUDA_BIN := $(CUDA_VENV)/bin
SOURCES := adaattn_compiler passes kernels
# The sources laid out as the wheel has them, for tools that read files instead of importing them.
LAYOUT := build/layout

.PHONY: help venv test test-cuda-codegen lint style layout types layers format demo bench gpu-check clean

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
# A core for each process: threads of two processes that wait for each other by spinning took most
# of the time. Tests of several threads ask for them.
test test-cuda-codegen: export OMP_NUM_THREADS ?= 1
TESTING := --numprocesses $(TEST_PROCESSES) --dist worksteal

test: $(STAMP)
	TRITON_INTERPRET=1 $(BIN)/pytest $(TESTING) tests/interpreted \
		--cov --cov-report= --cov-fail-under=0
	$(BIN)/pytest $(TESTING) --cov --cov-append --cov-report=term $(PYTEST_ARGS)

# Beside the capture of CUDA graphs: the older torch and Triton on what runs without a GPU.
SMOKE_TESTS := tests/kernels/test_choose.py tests/kernels/test_triton_compile.py \
	tests/kernels/test_triton_decode_compile.py tests/passes/test_graphs.py \
	tests/passes/test_near_misses.py tests/end_to_end/test_edges.py

# The older interpreter on each template, and on what differs between versions of Triton. Features
# are compiled by both (SMOKE_TESTS), and computed by the newer one.
INTERPRETED := tests/interpreted/test_triton_op.py tests/interpreted/test_triton_expressions.py \
	tests/interpreted/test_triton_forward.py::test_tiles_by_descriptors_are_the_same \
	tests/interpreted/test_triton_forward.py::test_programs_that_take_tiles_in_turn_make_the_same \
	tests/interpreted/test_triton_forward.py::test_any_dimensions_and_lengths_are_right \
	tests/interpreted/test_triton_decode.py::test_keys_of_a_mask_are_found

test-cuda-codegen:
	$(MAKE) venv VENV=$(CUDA_VENV) REQUIREMENTS=requirements/cuda.txt
	$(CUDA_BIN)/pytest $(TESTING) tests/cuda_codegen $(PYTEST_ARGS)
	$(CUDA_BIN)/pytest $(TESTING) $(SMOKE_TESTS) $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(CUDA_BIN)/pytest $(TESTING) $(INTERPRETED) $(PYTEST_ARGS)

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

# With the torch that PYTHON has, nothing being installed and no network: a copy of the sources, laid
# out as the package is, in whose folder both run. Its metadata is for the backend's name.
GPU := build/gpu
GPU_TEST_SECONDS ?= 160
GPU_TEST_PROCESSES ?= 14
# Of all; what the tests leave is for the benchmark, which may end 15 s after its time.
GPU_SECONDS ?= 450
GPU_ARGS ?=
RESULTS ?= benchmarks/results

# Interrupted rather than ended, pytest still says what has failed. A test that hangs costs its
# process, and whoever waits for the device in C hears no signal: by thread. Without pytest-xdist
# what takes longest comes last.
gpu-check: PYTHON := $(if $(findstring /,$(PYTHON)),$(abspath $(PYTHON)),$(PYTHON))
gpu-check:
	@$(PYTHON) -c 'import torch, triton, pytest' || { \
		echo "$(PYTHON) has not all of torch, triton and pytest: name one that has, PYTHON=..."; exit 1; }
	@[[ "$(GPU_ARGS)" == *--dry-run* ]] || \
		$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
		echo "no CUDA device: GPU_ARGS=--dry-run shows that the code runs, and no figures"; exit 1; }
	@rm -rf $(GPU) && mkdir -p $(GPU) $(RESULTS)
	@cp -Rp adaattn_compiler benchmarks tests pyproject.toml $(GPU)/
	@cp -Rp passes kernels $(GPU)/adaattn_compiler/
	@$(PYTHON) setup.py -q egg_info --egg-base $(GPU) 2>/dev/null || { mkdir -p $(GPU)/fallback.egg-info && \
		printf 'Metadata-Version: 2.1\nName: adaattn-compiler\nVersion: 0\n' \
			> $(GPU)/fallback.egg-info/PKG-INFO && \
		printf '[torch_dynamo_backends]\nadaattn = adaattn_compiler.backend:adaattn\n' \
			> $(GPU)/fallback.egg-info/entry_points.txt; }
	@status=0; cd $(GPU); \
	if $(PYTHON) -c 'import xdist' 2>/dev/null; then \
		order="-n $(GPU_TEST_PROCESSES) --dist worksteal tests/gpu"; else \
		order="$$(echo tests/gpu/test_triton_*.py) tests/gpu/test_end_to_end.py tests/gpu"; fi; \
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 PYTHONUNBUFFERED=1 \
		timeout -s INT -k 10 $(GPU_TEST_SECONDS) $(PYTHON) -m pytest -o addopts= \
		-o timeout=115 -o timeout_method=thread --import-mode=importlib \
		-ra --no-header --tb=short --durations=15 -m gpu $$order 2>&1 \
		| tee $(abspath $(RESULTS))/gpu_tests.log || status=$$?; \
	$(PYTHON) -m benchmarks.gpu --seconds $$(($(GPU_SECONDS) - SECONDS)) \
		--results $(abspath $(RESULTS)) \
		--revision "$$(git describe --always --dirty 2>/dev/null)" $(GPU_ARGS) || status=$$?; \
	exit $$status

clean:
	rm -rf build dist *.egg-info .coverage .coverage.* htmlcov
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(SOURCES) tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
