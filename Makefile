.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help install build lint test bench clean

help:  ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

install: $(BIN)/python  ## Make .venv with everything for development; compiles the core
	$(BIN)/pip install --quiet -e '.[test,bench,report,lint]' maturin

build: $(BIN)/python  ## Compile the core again after a change in rust/
	$(BIN)/maturin develop --release --quiet

lint:  ## Check format, lints, types and the stub of the compiled module
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets --locked -- -D warnings
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest fastsal._core

test:  ## Run all tests, Rust and Python
	cargo test --quiet --workspace --locked
	$(BIN)/python -m pytest -q

bench:  ## Time the parts against their peers
	cargo bench --quiet -p fastsal-core
	$(BIN)/python -m pytest benches/python -q

clean:  ## Remove what was built
	rm -rf target $(VENV)
