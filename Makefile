# `make` alone lists what there is. Every target works from a fresh clone.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# The steps of one target share the cores already; and their order is meant.
.NOTPARALLEL:

VENV := $(CURDIR)/.venv
PYTHON := $(VENV)/bin/python
export PATH := $(HOME)/.cargo/bin:$(VENV)/bin:$(PATH)
export VIRTUAL_ENV := $(VENV)
# Tests that need the built programs fail, and do not skip, when those are not there.
export VHOSTD_REQUIRED := 1

# vhostd-py is a Python module and links only into a Python; its tests are those of pytest.
CARGO_TEST_SCOPE := --workspace --exclude vhostd-py
CARGO_TEST := $(shell PATH="$(PATH)" command -v cargo-nextest >/dev/null && echo nextest run || echo test)
SCRIPTS := vm-images/build scripts/demo.py
DEMO ?=
BENCH ?=
PYTEST ?=

.PHONY: help deps build images lint test test-rust test-python test-qemu test-long bench demo clean

help: ## Lists the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{ printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: build ## Boots a real guest on a vhostd volume, and one on a clone of it (DEMO=--quick: small ones)
	$(PYTHON) scripts/demo.py $(DEMO)

test: build lint test-rust images ## Everything CI runs: build, linters, Rust and Python tests, guests
	$(PYTHON) -m pytest -m "not long" $(PYTEST)

deps: ## Installs what building and testing need (apt packages, .venv)
	scripts/install-deps

build: deps ## Builds vhostd into .venv, and the load generator
	maturin develop --release --quiet
	cargo build --release --quiet --locked -p vhostd-loadgen

images: deps ## Builds the guests that tests boot (cached)
	vm-images/build

lint: build ## Formatting, linters and types of both halves
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
	$(PYTHON) -m ruff check . $(SCRIPTS)
	$(PYTHON) -m ruff format --check . $(SCRIPTS)
	$(PYTHON) -m mypy

test-rust: deps ## The engine's tests
	cargo $(CARGO_TEST) $(CARGO_TEST_SCOPE) --locked

test-python: build ## pytest without guests
	$(PYTHON) -m pytest -m "not long and not qemu" $(PYTEST)

test-qemu: build images ## pytest with guests
	$(PYTHON) -m pytest tests/qemu -m "not long" $(PYTEST)

test-long: build images ## Tests that take minutes each: bigger trees, comparisons with a peer
	$(PYTHON) -m pytest -m long $(PYTEST)

bench: build ## Side-by-side benchmarks (BENCH=... for their arguments)
	$(PYTHON) -m bench $(BENCH)

clean: ## Removes what was built here (not the cache of guest images)
	rm -rf target build .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis vhostd/_native*.so
