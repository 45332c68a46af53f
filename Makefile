# make demo   train on the sample text, generate from it, print the top-K tables, draw the comparison
# make test   the whole test suite
# make lint   ruff and mypy
# make clean  remove what the targets made
# Each target makes .venv by itself; PYTHON=python3.12 make demo picks another interpreter.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[test,plots]'
	touch $@

demo: $(BIN)/.installed
	$(BIN)/python scripts/demo.py

test: $(BIN)/.installed
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build runs *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
