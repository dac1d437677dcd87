# make help says what there is. Needs make, sh, and Python 3.11 or newer; everything else is installed into $(VENV).

VENV ?= .venv
PYTHON ?=
BACKEND ?=
export VENV PYTHON BACKEND

# Settings of the quickstart; ARGS goes to experiments.quickstart as it is.
CORPUS =
RUN_DIR =
DATA_DIR =
NUM_STEPS =
ARGS =

# A worker per core; a file's tests stay together, so that its fixtures are made once.
PYTEST_ARGS ?= -n auto --dist loadfile

# The environment with torch and transformers, which nothing else needs.
PARITY_VENV ?= .venv-parity
SEED ?=

# What benchmark-serve replays: a CSV of TIMESTAMP, ContextTokens, GeneratedTokens; a synthetic trace if it is empty.
TRACE =

py := $(VENV)/bin/python
flag = $(if $($(1)),'--$(2)=$($(1))')

.PHONY: help quickstart test test-ops test-jetstream test-parity test-tpu benchmark-serve benchmark-train golden lint typecheck venv venv-dev venv-ops venv-parity clean
.DEFAULT_GOAL := help

help: ## this list
	@echo "make TARGET [BACKEND=cpu|tpu|cuda] [PYTHON=python3.12] [VENV=.venv]"
	@echo
	@sed -n 's/^\([a-z-]*\):[^#]*## /  \1 — /p' Makefile
	@echo
	@echo "  your own text:  make quickstart CORPUS=/a/folder RUN_DIR=runs/mine DATA_DIR=data/mine [NUM_STEPS=1000]"

quickstart: venv ## from a folder of text to a served model: prepare, train, evaluate, serve, ask
	@$(py) -m experiments.quickstart $(call flag,CORPUS,corpus) $(call flag,RUN_DIR,run_dir) \
	  $(call flag,DATA_DIR,data_dir) $(call flag,NUM_STEPS,num_steps) $(ARGS)

test: lint typecheck ## lint, type check and the whole test suite
	@$(py) -m pytest $(PYTEST_ARGS)

test-ops: venv-ops ## behind nginx, watched by Prometheus, in a browser; installs Debian's packages for them if they are missing
	@sh tools/debian_packages.sh nginx=nginx-light prometheus=prometheus promtool=prometheus chromium=chromium
	@$(py) -m pytest tests/ops

test-jetstream: venv-dev ## the archived server's own stubs, load tester and Engine API, without its TensorFlow
	@[ -d .venv-jetstream/jetstream ] || $(py) -m pip install -q --no-deps --target .venv-jetstream -r requirements-jetstream.txt
	@$(py) -m pytest tests/jetstream

test-parity: venv-parity ## against live transformers on shapes drawn afresh; writes docs/families.md. SEED=n repeats a run
	@HF_HUB_OFFLINE=1 PARITY_SEED=$(SEED) $(PARITY_VENV)/bin/python -m pytest -n auto tests/parity

benchmark-serve: venv-parity ## the engine against transformers on an arrival trace; JSON at the end. TRACE=file.csv, ARGS=...
	@HF_HUB_OFFLINE=1 JAX_PLATFORMS=cpu $(PARITY_VENV)/bin/python -m benchmarks.serve_trace $(call flag,TRACE,trace) $(ARGS)

benchmark-train: venv-parity ## training speed beside transformers with torch, eager and compiled; JSON at the end. ARGS=...
	@HF_HUB_OFFLINE=1 GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(PARITY_VENV)/bin/python -m benchmarks.train_speed $(ARGS)

test-tpu: venv-dev ## kernels compiled for TPUs that are not there (x86-64 Linux)
	@[ -d .venv-tpu/libtpu ] || $(py) -m pip install -q --no-deps --target .venv-tpu -r requirements-tpu.txt
	@PYTHONPATH=.venv-tpu $(py) -m pytest tests/tpu

golden: venv-parity ## make the files of tests/golden anew
	@HF_HUB_OFFLINE=1 $(PARITY_VENV)/bin/python -m tests.golden.make

lint: venv-dev ## ruff
	@$(py) -m ruff check .

typecheck: venv-dev ## mypy
	@$(py) -m mypy

venv: ## the environment of requirements.txt, in $(VENV)
	@sh tools/venv.sh run

venv-dev: ## the same with the tools of requirements-dev.txt
	@sh tools/venv.sh dev

venv-ops: ## and what drives a browser
	@sh tools/venv.sh ops

venv-parity: ## both, torch and transformers, in $(PARITY_VENV)
	@VENV=$(PARITY_VENV) sh tools/venv.sh parity

clean: ## remove the environment and caches; runs/ and data/ stay
	rm -rf .venv .venv-parity .venv-jetstream .venv-tpu .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
