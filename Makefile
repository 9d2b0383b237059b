# Everyday commands. Each makes its environment first: nothing but Python 3.11+ has to be there.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
CONFIG ?= pipelines/configs/demo.yaml
CHECKED := skd_lib components pipelines examples docs images tests setup.py
SCRIPTS := docs/benchmarks/*.py docs/evidence/*.py images/tools/*.py

.DEFAULT_GOAL := help
.PHONY: help install demo bench test test-slow test-all mutants test-gpu test-comet test-vllm test-images lock lint format types compile compile-check docs doctor clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

install: $(STAMP) ## Create the environment in .venv

# Again whenever what is to be installed has changed.
$(STAMP): pyproject.toml setup.py constraints/main.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=...")'
	@echo "creating the environment in $(VENV); the first time this takes some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/main.txt \
		-e '.[training,tracking,s3,pipelines,dev]'
	@touch $@

demo: $(STAMP) ## Run the whole pipeline on this machine: real models, real data (CONFIG=..., ARGS=... for another)
	$(BIN)/skd run $(CONFIG) $(ARGS)

bench: $(STAMP) ## Measure how fast sampling is on this machine (ARGS=... for options)
	$(BIN)/python docs/benchmarks/benchmark.py sampling $(ARGS)

PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder
OPTIONAL := not comet and not trl and not vllm and not docker

test: $(STAMP) ## Run the quick tests, on all cores (ARGS=... for pytest's options)
	$(PYTEST) -m 'not slow and $(OPTIONAL)' $(ARGS)

test-slow: $(STAMP) ## Run the tests that take longer: whole pipelines, kills, outages, fuzzing
	$(PYTEST) -m 'slow and $(OPTIONAL)' $(ARGS)

test-all: $(STAMP) ## Run all of them
	$(PYTEST) $(ARGS)

mutants: $(STAMP) ## Run the sampler's tests against seeded mistakes in its code: each must be caught (minutes)
	$(BIN)/python tests/sampling/mutants.py $(ARGS)

test-gpu: $(STAMP) ## Run the tests that need a CUDA GPU (one after the other: they share it)
	SKD_TEST_GPU=1 $(BIN)/python -m pytest tests/sampling/test_cuda.py $(ARGS)

test-comet: $(STAMP) ## Run the tests that need COMET; its own environment is made the first time (minutes)
	$(BIN)/python -m pytest -m comet tests/evaluation/comet $(ARGS)

test-vllm: $(STAMP) ## Run the tests that need vLLM; its own environment and Triton are made the first time (minutes, 3.2 GB)
	$(BIN)/python -m pytest -m vllm tests/vllm $(ARGS)

test-images: $(STAMP) ## Build the images and run the pipeline in them; needs docker.io, mmdebstrap, docker-registry (ARGS=...)
	$(BIN)/python -m pytest -m 'docker or not docker' tests/images $(ARGS)

lock: $(STAMP) ## Lock again what the images install, after a change to pyproject.toml or the constraints
	$(BIN)/python images/tools/image_tools.py lock

lint: $(STAMP) ## Check style, image files and workflows
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/hadolint images/Dockerfile
	$(BIN)/actionlint
	$(BIN)/zizmor --quiet --offline .github

format: $(STAMP) ## Put style right
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

# mypy does not read setup.py: skd_kfp's two folders are linked for it.
types: $(STAMP) ## Check types
	mkdir -p build/types/skd_kfp && ln -sfn ../../../components ../../../pipelines build/types/skd_kfp/
	$(BIN)/mypy
	$(BIN)/mypy $(SCRIPTS)

compile: $(STAMP) ## Compile the pipeline to pipelines/compiled
	$(BIN)/skd compile

compile-check: $(STAMP) ## Fail if the compiled pipeline has drifted from its definition
	$(BIN)/skd compile --check

# The notices are about mkdocs' future, and are not errors.
docs: $(STAMP) ## Build the site of the documentation in build/site; broken links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

doctor: $(STAMP) ## Look at this machine
	$(BIN)/skd doctor

clean: ## Remove the environment and caches (runs/ stays)
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
