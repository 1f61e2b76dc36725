# `make demo` and `make test` are each enough alone on a fresh machine with Python 3.12 or 3.13.
#   make demo EHR_ROOT=<folder>   the same on real MIMIC-IV tables
.PHONY: setup demo test gpu gpu-dry-run test-slow lint format bench bench-quick bench-compare clean
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2
EHR_ROOT ?=
OUTPUT ?= demo-output

help:
	@echo "make demo [EHR_ROOT=<MIMIC-IV folder>] [OUTPUT=<folder>]   tables to attributions"
	@echo "make test          lint, types and every test (make test-slow: the exhaustive forms too)"
	@echo "make setup         .venv with everything"
	@echo "make bench         every benchmark, the tables and plots (make bench-quick: checks only)"
	@echo "make gpu           all that needs a GPU: tests, benchmarks, tuning, pages (PYTHON=python3: that one, no .venv)"
	@echo "make bench-compare BASE=<revision>   is the working tree slower than that revision?"
	@echo "make lint | format | clean"

$(VENV)/.ready: pyproject.toml
	@python=$$(sh .ci/find-python) && rm -rf $(VENV) && "$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all,dev]'
	@touch $@

$(VENV)/.built: $(VENV)/.ready kernels/rollout_kernels/_native/rows.c
	$(BIN)/python -c 'from setuptools import setup; setup()' --quiet build_ext --inplace
	@touch $@

setup: $(VENV)/.built

demo: setup
	$(BIN)/rollout demo --output "$(OUTPUT)" --overwrite $(if $(EHR_ROOT),--ehr-root "$(EHR_ROOT)")

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/python -m pytest -m "not slow"
	$(BIN)/python -m bench.run --quick

test-slow: lint
	$(BIN)/python -m pytest

bench: setup
	$(BIN)/python -m bench.run

bench-quick: setup
	$(BIN)/python -m bench.run --quick

gpu gpu-dry-run: $(if $(PYTHON),,setup)
	@$(MAKE) -f bench/gpu.mk $@ PYTHON=$(or $(PYTHON),$(BIN)/python)

bench-compare: setup
	@test -n "$(BASE)" || { echo "make bench-compare BASE=<revision>" >&2; exit 2; }
	$(BIN)/python -m bench.gate --base "$(BASE)"

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/rollout_kernels/_native/*.so .pytest_cache .mypy_cache .ruff_cache
