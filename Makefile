# The task runner. `make demo` and `make test` each do all their own set-up; nothing else needs to be run first.
# Wheels that take long to build (llama-cpp-python) are cached in $(CACHE), outside the tree.
SHELL := /bin/bash
VENV  := .venv
BIN   := $(VENV)/bin
ARGS  ?=
# Tests side by side, a file at a time: most of the end-to-end ones wait. TESTERS=0 runs them in one process.
TESTERS ?= auto
N     ?= 20
SEEDS ?= 300
FIRST ?= 0
JOBS  ?= 1

.PHONY: help setup demo test check lint types walls unit e2e coverage sim kill-loop encoder bench clean
help:            ## this list
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

STAMP := .stamp-setup$(if $(HF),-hf)$(if $(RPC),-rpc)
setup: $(STAMP)   ## the environment; RPC=1: builds llama.cpp anew where it was kept without models split over boards
$(STAMP): pyproject.toml config/constraints.txt .ci/setup
	@.ci/setup
	@touch $@

demo: setup      ## three nodes, a hub and a Linear double on this machine: the main job, told as it happens
	@$(BIN)/python -m piclusterd.demo $(ARGS)

test: setup check unit  ## everything: lint, types, walls, unit, simulation slice, end to end on loopback; HF=1: torch too

check: lint types walls
lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
types: setup
	@$(BIN)/mypy
walls: setup
	@$(BIN)/lint-imports --no-cache

unit: setup
	@$(BIN)/python -m pytest -n $(TESTERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

e2e: setup       ## all end-to-end lanes, the slow ones too: networks, boards, booted machines; root, ip, nft; BUSY=600
	@PICLUSTER_E2E=all PICLUSTER_BUSY_S=$(BUSY) $(BIN)/python -m pytest tests/e2e $(ARGS)

coverage: setup  ## branch coverage of each decider by its own tests: one line each, status 1 below 100 %
	@$(BIN)/python -m bench.deciders $(ARGS)

sim: setup       ## make sim SEEDS=300 [FIRST=0] [JOBS=1] [MINUTES=3] [COMPILED=1]: the simulator over many seeds
	@$(BIN)/python -m $(if $(COMPILED),bench.compiled,piclusterd.sim) --seeds $(SEEDS) --first $(FIRST) --jobs $(JOBS) $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

kill-loop: setup ## make kill-loop N=20 [NETNS=1]: SIGKILL the coordinator N times under load, then compare the ledgers
	@$(BIN)/python -m piclusterd.demo.kill_loop --kills $(N) $(if $(NETNS),--netns) $(ARGS)

encoder: setup   ## a real sentence encoder for the tests that ask for one: 90 MB, once, kept outside the tree
	@$(BIN)/python tests/sentence_encoder.py

bench: setup     ## make bench NAME=routing ARGS="--quick --json out.json"
	@$(BIN)/python bench/$(NAME).py $(ARGS)

clean:           ## remove what the targets above made inside the tree
	rm -rf $(VENV) .stamp-setup* .demo build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
