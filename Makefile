.DEFAULT_GOAL := help
BIN := .venv/bin
SPREAD = --numprocesses $(or $(WORKERS),$(1)) --dist loadgroup --no-loadscope-reorder

# The first process that imports a module compiles it for all: without that, each start takes 15 s of a core longer.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test test-fast test-long gpu-check check clean

help: ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/ready ## fill .venv with server (CPU), trainer and development tools; quick the second time

.venv/ready: pyproject.toml deploy/setup.sh
	deploy/setup.sh
	@touch $@

demo: setup ## sample, train and evaluate with a small pair of models; needs no GPU
	PATH="$(CURDIR)/$(BIN):$$PATH" deploy/demo/run.sh

test: setup ## the whole test suite, on real engines, in two processes; WORKERS=0 runs it in one
	$(BIN)/python -m pytest $(call SPREAD,2)

test-fast: setup ## the tests that start no process and no engine, in three processes: many wait for a moment
	$(BIN)/python -m pytest $(call SPREAD,3) -m "unit and not long"

test-long: setup ## what is too long for every change: 5,000 made-up requests, the GPU's path, a server killed 20 times, a client 30 times
	$(BIN)/python -m pytest -m long

gpu-check: ## on a GPU node with the extras server and trainer: is it exact, how fast; DEVICE=cpu tries it without a GPU
ifeq ($(DEVICE),cpu)
	$(MAKE) setup
	$(BIN)/python tests/gpu/check.py --device cpu $(ARGUMENTS)
else
	python3 tests/gpu/check.py $(ARGUMENTS)
endif

check: setup ## lint, format and types, of deploy/ too
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	deploy/check.sh

clean: ## remove what the other targets made
	rm -rf .venv .cache demo-output build dist *.egg-info
