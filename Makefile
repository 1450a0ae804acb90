.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help install build lint test asan miri arm64 bench sweep clean

help:  ## List the targets
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

install: $(BIN)/python  ## Create .venv with all dependencies for development and compile the core
	$(BIN)/pip install --quiet -e '.[test,bench,report,lint]' maturin

build: $(BIN)/python  ## Recompile the core after a change in rust/
	$(BIN)/maturin develop --release --quiet

lint:  ## Check formatting, lints, types, layers and the stub of the compiled module
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets --locked -- -D warnings
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m mypy.stubtest fastsal._core

test:  ## Run all Rust and Python tests
	cargo test --quiet --workspace --locked
	$(BIN)/python -m pytest -q

# On a stable compiler: the switch only allows the option. A stack for every call would take minutes.
ASAN := RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" CARGO_TARGET_DIR=target/asan \
	ASAN_OPTIONS=detect_stack_use_after_return=0 \
	cargo test --quiet -p fastsal-core --locked --target x86_64-unknown-linux-gnu

asan:  ## Run the tests of the core with AddressSanitizer, portable and with the best instruction set
	FASTSAL_ISA=portable $(ASAN)
	$(ASAN)

# Needs `rustup component add --toolchain nightly miri`; only tests without threads and without loops
# over many shapes are short enough.
miri:  ## Run the tests of raw pointers in the core with Miri
	cargo +nightly miri test --quiet -p fastsal-core --lib -- cholesky:: memory:: rows:: layout::

# Needs `rustup target add aarch64-unknown-linux-gnu`, and qemu-user and gcc-aarch64-linux-gnu.
arm64:  ## Run the tests of kernels on an emulated arm64 processor, a few minutes
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu" \
	cargo test --quiet -p fastsal-core --lib --locked --target aarch64-unknown-linux-gnu -- \
	simd:: panels:: cholesky:: accumulate:: interleaved:: inverse:: greedy:: select::

bench:  ## Run the Rust and Python benchmarks
	cargo bench --quiet -p fastsal-core
	$(BIN)/python -m pytest benches/python -q

sweep:  ## Compare gradients with autograd for every family of timm; rerun to resume
	$(BIN)/python -m benches.families

clean:  ## Remove build output and .venv
	rm -rf target $(VENV)
