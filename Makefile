# Two commands do everything, their own set-up in .venv included: make demo, make test.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo demo-toy test lint types unit test-gguf clean

help:
	@echo "make demo   teach a real model an invented town: yrun fetch (98 MB), train, eval"
	@echo "make demo-toy   train a tiny base and tune it on an invented law, in Chinese and English"
	@echo "make test   lint, types and tests"
	@echo "make test-gguf   let llama.cpp itself read our GGUF files; builds it for 5 to 20 minutes"
	@echo "make clean  remove what the demo and the tests have made"

# Made again when the dependencies change.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
	touch $@

# The tests of the recipe are left to yrun eval, which compares the base and the result once.
demo: $(READY)
	$(BIN)/yrun fetch models
	$(BIN)/yrun train recipes/port_sft.yaml --overwrite 'eval.tasks=[]'
	$(BIN)/yrun eval recipes/port_sft.yaml
	@echo 'talk to it: $(BIN)/yrun chat recipes/port_sft.yaml'

demo-toy: $(READY)
	$(BIN)/yrun train recipes/legal_sft.yaml --overwrite

test: lint types unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/python -m pytest

# Without what sees pictures, which is a third of its files.
test-gguf: $(READY)
	CMAKE_ARGS=-DLLAVA_BUILD=OFF $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[llamacpp]'
	$(BIN)/python -m pytest -n0 tests/models/gguf/llama_cpp.py

clean:
	rm -rf outputs dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
