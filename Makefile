# The front door. Every target does its own set-up; `make help` lists them.
#
# The room build/ and the target `build` share a name, so every target is .PHONY.
SHELL := /bin/sh
.DEFAULT_GOAL := help

VENV ?= .venv
REFERENCE_VENV ?= .venv-reference
BIN := $(VENV)/bin
MINITRON := $(BIN)/minitron

MODEL ?= models/small-minitron
PRECISION ?= auto
EXECUTION ?= exact
# Extra options for a target: make test ARGS="-k layout", make bench-cpu ARGS="--shape 4b"
ARGS ?=

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# --- set-up -------------------------------------------------------------------------------------------------------

$(VENV)/.ready: pyproject.toml tools/make_venv.sh
	@tools/make_venv.sh $(VENV) dev
	@touch $@

$(REFERENCE_VENV)/.ready: pyproject.toml tools/make_venv.sh
	@tools/make_venv.sh $(REFERENCE_VENV) reference
	@touch $@

.PHONY: setup
setup: $(VENV)/.ready ## make the virtual environment (the other targets do it by themselves)

# --- the main job -------------------------------------------------------------------------------------------------

.PHONY: demo
demo: $(VENV)/.ready ## weights to streamed tokens on this machine (MODEL=, PRECISION=, EXECUTION=)
	@$(MINITRON) demo --model $(MODEL) --precision $(PRECISION) --execution $(EXECUTION) $(ARGS)

# --- tests and checks ---------------------------------------------------------------------------------------------

.PHONY: test
test: $(VENV)/.ready ## all tests but those that need torch (test-reference)
	@echo "Left out here: tests marked 'reference' (make test-reference runs them)."
	@$(BIN)/python -m pytest -q -m "not reference and not browser" $(ARGS)

.PHONY: test-reference
test-reference: $(REFERENCE_VENV)/.ready ## recompute the committed fixtures with transformers' own model (needs torch)
	@$(REFERENCE_VENV)/bin/python -m pytest -q -m reference $(ARGS)

.PHONY: check
check: $(VENV)/.ready ## lint, types, import direction, docs
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "Not formatted; run 'make format'."; exit 1; }
	@$(BIN)/mypy core build model_repo clients models tools tests benches
	@$(BIN)/python -m pytest -q tests/test_house_*.py

.PHONY: format
format: $(VENV)/.ready ## format the code
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

.PHONY: docs
docs: $(VENV)/.ready ## write docs/cli.md anew from the command line's own help
	@$(BIN)/python tools/cli_docs.py

# --- figures ------------------------------------------------------------------------------------------------------

.PHONY: bench-cpu
bench-cpu: $(VENV)/.ready ## the server against the bare OpenVINO pipeline, in alternating runs
	@$(BIN)/python benches/bench_cpu.py $(ARGS)

.PHONY: bench-convert
bench-convert: $(VENV)/.ready ## conversions of a full 4B shape against a plain copy, in alternating runs
	@$(BIN)/python benches/bench_convert.py $(ARGS)

.PHONY: clean
clean: ## remove what the targets made (out/, virtual environments)
	@rm -rf out $(VENV) $(REFERENCE_VENV)
