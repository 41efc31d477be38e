# Every target makes what it needs; `make help` lists them. Variables marked (*) are read from the command line only.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PIP_CONF ?=
BASE_IMAGE ?=
IMAGE ?= lrt-server
BUILD_FLAGS ?=
HOST =
PORT =
CHECKPOINT =
ARGS =

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
RUNTIME = $(VENV)/.runtime-installed
DEVELOPMENT = $(VENV)/.development-installed
CLIENTS_VENV = .venv-clients
CLIENTS = $(CLIENTS_VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup serve test check clients clients-setup proofs bench train docker clean

help: ## list the targets and variables
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  PYTHON=python3.12      the interpreter to build $(VENV) from (3.10 or newer)"
	@echo "  TORCH_INDEX=URL        another package index for torch alone, such as one of CPU builds"
	@echo "  HOST= PORT= (*)        where to serve"
	@echo "  CHECKPOINT=DIR (*)     what to serve; the bundled checkpoint without it"
	@echo "  ARGS='--flag ...' (*)  more flags for serve, test (pytest), bench or train"
	@echo "  IMAGE= BASE_IMAGE= PIP_CONF=FILE BUILD_FLAGS=  for docker; see docker/Dockerfile"

# Only what serving needs, so that a newcomer does not wait for the development tools. Torch goes first and alone: its build
# (CPU or CUDA, by TORCH_INDEX or pip's own configuration) must be settled before another package asks for it.
$(RUNTIME): pyproject.toml constraints.txt $(wildcard lrt_core/kernels/*.cpp lrt_core/kernels/*.h)
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) found; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) -V); torch is a large download, this can take some minutes"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch
	@$(PIP) -e .
	@touch $@

$(DEVELOPMENT): $(RUNTIME)
	@echo "Adding the training and development tools to $(VENV)"
	@$(PIP) -e '.[dev]'
	@touch $@

setup: $(DEVELOPMENT) ## make .venv with everything for development

serve: $(RUNTIME) ## serve a checkpoint on http://127.0.0.1:8000
	@exec $(BIN)/lrt-server $(CHECKPOINT) $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT)) $(ARGS)

# A process for every core, up to eight, and one thread in each: busy OpenMP pools that share few cores spin against each other.
test check: export OMP_NUM_THREADS = 1
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 8

test: $(DEVELOPMENT) ## run the tests
	@$(PYTEST) $(ARGS)

check: $(DEVELOPMENT) ## ruff, mypy --strict, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) $(ARGS)

# The clients bring a hundred packages, so they live apart from the server, which runs in $(VENV).
$(CLIENTS): tests/clients/requirements.txt
	@echo "Setting up $(CLIENTS_VENV) with the clients; this can take some minutes"
	@$(PYTHON) -m venv --clear $(CLIENTS_VENV)
	@$(CLIENTS_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile -r $<
	@$(CLIENTS_VENV)/bin/python -m pip check
	@touch $@

clients-setup: $(CLIENTS)

clients: $(DEVELOPMENT) $(CLIENTS) ## run real clients (openai, LangChain, LiteLLM, llm, lm_eval) against a server
	@LRT_PYTHON=$(abspath $(BIN)/python) $(CLIENTS_VENV)/bin/python -m pytest --confcutdir=tests/clients/live \
		-o filterwarnings=default --disable-warnings tests/clients/live $(ARGS)

proofs: $(DEVELOPMENT) ## check the claims about state, batches and memory at full scale (minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.proofs $(ARGS)

bench: $(RUNTIME) ## measure the engine's speed on this machine
	@$(BIN)/lrt-bench offline $(ARGS)

train: $(DEVELOPMENT) ## train a checkpoint like the bundled one in runs/small, or go on
	@$(BIN)/lrt-train $(if $(wildcard runs/small/states/step-*),--resume runs/small,--preset small --run runs/small) $(ARGS)

BUILD = $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) \
	$(if $(PIP_CONF),--secret id=pip_conf$(comma)src=$(PIP_CONF)) $(BUILD_FLAGS) -f docker/Dockerfile -t $(IMAGE) .
comma := ,

docker: ## build the CPU image, with buildah where no docker engine runs
	@if docker info >/dev/null 2>&1; then DOCKER_BUILDKIT=1 docker build $(BUILD); \
	elif command -v buildah >/dev/null; then buildah bud --isolation chroot --format docker $(BUILD); \
	else echo "error: neither a running docker engine nor buildah found" >&2; exit 1; fi

clean: ## remove what make made: the virtual environments, builds and caches (runs/ stays)
	rm -rf $(VENV) $(CLIENTS_VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find lrt_core training server tests -name __pycache__ -type d -prune -exec rm -rf {} +
