# Every target works as the first command on a machine with Python 3.11+ and pip.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: venv demo test test-slow check style bench

venv: .venv/done

# torch first, at its exact pin: a range would pull a CUDA build of several GB onto a machine without a GPU.
.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: venv
	$(BIN)/poc-lora demo

test: venv
	$(BIN)/pytest -m "not slow"

test-slow: venv
	$(BIN)/pytest -m slow

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_house.py

style: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv
	$(BIN)/python scripts/benchmarks/train.py
