# Each target does its own set-up: a virtual environment in .venv, torch pinned by constraints.txt, Myriad itself.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-slow lint types check gpu-check clean

demo: $(INSTALLED)
	$(BIN)/myriad demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/pyright

check: lint types test

# Needs a CUDA device: the kernels' tests there, then their times. OUT=FILE keeps the figures.
gpu-check: $(INSTALLED)
	$(BIN)/python benchmarks/gpu_check.py $(if $(OUT),--out $(OUT))

# torch first, so that nothing else can pull another build of it.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(INSTALLED)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
