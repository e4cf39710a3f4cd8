# make demo   trains the demo; DEMO_STEPS=20 make demo for a quick look
# make test   runs the tests; ARGS=--exhaustive for cases that are much like others, too
# make lint   runs ruff and mypy
# make bench  times a training step against its peers
# make bench-smoke  runs what measures a GPU, small and on a CPU: it works, and the loss falls
# make sweep  finds the demo's learning rates anew (resumable)
# make build  builds the wheel and the sdist into dist/
#
# Each first makes .venv if there is none and installs what it needs there; nothing is installed again while
# pyproject.toml stays as it is. ARGS="..." reaches the program: make test ARGS="-k columns".

PYTHON ?= python3
VENV   ?= .venv
# One exact version, installed before anything that asks for a range: the newest torch may be newer than the package
# supports.
TORCH  ?= torch==2.13.0

BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check
# The stamp of an installation carries pyproject.toml's checksum: file times say nothing in a fresh checkout.
HASH := $(firstword $(shell cksum < pyproject.toml))

# Every model here is built from a configuration; nothing is loaded from a hub.
export HF_HUB_OFFLINE ?= 1

.PHONY: help install demo test lint format bench bench-smoke sweep build clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(BIN)/python
	$(PIP) install "$(TORCH)"
	@touch $@

$(VENV)/.installed-%-$(HASH): $(VENV)/.torch
	$(PIP) install --editable ".[$*]"
	@touch $@

install: $(VENV)/.installed-dev-$(HASH)

demo: $(VENV)/.installed-demo-$(HASH)
	$(BIN)/python examples/demo.py $(ARGS)

# Compiled kernels are kept in the checkout, so that a second run of the tests starts warm. One process of tests for each
# core: most of their time is tracing, in one thread; the compiler's own workers, and threads that spin while they wait, would
# only be in their way. WORKERS=0 makes it one process, in which --pdb works.
WORKERS ?= auto
test: export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor
test: export TORCHINDUCTOR_COMPILE_THREADS ?= 1
test: export OMP_WAIT_POLICY ?= PASSIVE
test: install
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy grass_compile

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-bench-$(HASH)
	$(BIN)/python -m benchmarks.step $(ARGS)

bench-smoke: install
	$(BIN)/python -m benchmarks.gpu --sizes tiny --device cpu --steps 2 --out .cache/bench/gpu.json \
	    --methods dense frozen adamw8bit lora grass-blind grass-rows grass-muon
	$(BIN)/python -m benchmarks.llama_13b --device cpu --hidden 128 --layers 2 --rank 16 --tokens 64 --steps 20 \
	    --out .cache/bench/13b.json

sweep: $(VENV)/.installed-demo-$(HASH)
	$(BIN)/python -m benchmarks.sweep $(ARGS)

build: install
	$(BIN)/python -m build

clean:
	rm -rf build dist .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
