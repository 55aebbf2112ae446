.DEFAULT_GOAL := help
TARGET := $(or $(CARGO_TARGET_DIR),target)
.PHONY: help demo test soak bench build lint fmt

help: ## What there is to do
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

demo: ## A CA, an agent, two workloads with an Envoy each; rotations and restarts under load, in 3 minutes (KEEP=1: leave it running)
	@tests/setup envoy
	cargo build --workspace --bins
	@$(TARGET)/debug/chancery-demo $(if $(KEEP),--keep)

test: ## Every test, with its own set-up
	@tests/run

soak: ## The tests that take long, at full size
	@SOAK=1 tests/run

bench: ## The budgets of the design, measured (QUICK=1: within 5 minutes)
	cargo build --release --workspace --bins
	@$(TARGET)/release/chancery-bench

build: ## Release binaries in target/release
	cargo build --release --workspace --bins

lint: ## Format and lints, as CI checks them
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

fmt: ## Format the code
	cargo fmt --all
