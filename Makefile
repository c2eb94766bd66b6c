# Every target sets up .venv itself: no step comes before `make demo` or `make test`.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
# Tests of one process run in two processes, a file at a time; the others one after the other.
AT_ONCE := -n 2 --dist loadfile
OTHERS := alone or distributed or deepspeed or fault or netns or slurm or browser or gpu

.DEFAULT_GOAL := help
.PHONY: help setup demo docs test test-all test-gpu soak check format size

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(STAMP) ## create or update .venv with the pinned versions

demo: $(STAMP) ## the main job on built-in data: pack, train four models, export, verify, probe
	$(BIN)/python -m pipeline.commands.demo

docs: $(STAMP) ## the site of docs/, into build/docs; offline, and strict: a warning fails
	$(BIN)/python -m sphinx -W -n --keep-going -q -d build/doctrees docs build/docs
	@echo build/docs/index.html

test: $(STAMP) ## the default lane, about 5 minutes on 2 cores
	$(PYTEST) --budgets $(AT_ONCE)

test-all: check ## checks and every lane, with the time budgets; what .ci/run calls
	$(PYTEST) --budgets $(AT_ONCE) -m "not ($(OTHERS) or soak)"
	$(PYTEST) --budgets -m "($(OTHERS)) and not soak"

test-gpu: ## the gpu lane, with PYTHON as it is: nothing is installed, what is missing is said
	$(PYTHON) -m pytest -m gpu -o minversion=0 -W default tests/gpu

soak: $(STAMP) ## the kill and fuzz tests with their full counts: hours
	$(PYTEST) -m soak --timeout 0

check: $(STAMP) ## format, lint, types and the site, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/shellcheck .ci/run docker/entrypoint.sh
	$(BIN)/hadolint docker/Dockerfile
	$(MAKE) --no-print-directory docs

size: ## lines of code by folder, without blank lines and comments
	@$(PYTHON) tests/project/size.py latentmill pipeline launch examples benchmarks docker tests

format: $(STAMP) ## rewrite the code as `check` wants it, as far as that is mechanical
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[train,deepspeed,s3,onnx,docs,dev]'
	touch $@
