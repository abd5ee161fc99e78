# Everything runs from a virtual environment in .venv that the first target makes; Python 3.11 and pip are enough.
PYTHON ?= python3.11
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup test conformance test-slow lint format demo bench compare clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

setup: .venv/done  ## make the virtual environment

.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]' -c constraints.txt
	touch $@

test: setup  ## the fast tests and PEFT's own, some five minutes on two cores
	$(BIN)/python -m pytest -q -n 2 --dist loadfile
	$(MAKE) conformance

conformance: setup  ## PEFT's own test suite on RPSConfig, both modes; about a minute
	$(BIN)/python tests/conformance.py ../shared/tools

test-slow: setup  ## the slow tests, run before an issue is closed
	$(BIN)/python -m pytest -q -m slow

lint: setup  ## the linters and the formatter, which change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: setup  ## let the formatter and the linter's safe fixes change files
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: setup  ## train a small ViT on real digits, dense and compressed, and compare; about two minutes
	$(BIN)/python scripts/demo.py

bench: setup  ## time and memory beside the dense model, some 20 minutes
	$(BIN)/python scripts/bench.py

compare: setup  ## the quick comparison with pruning, smaller models and earlier sharing, under 30 minutes on two cores
	$(BIN)/python scripts/compare.py --preset quick

clean:  ## remove what was built
	rm -rf .venv build *.egg-info .pytest_cache .hypothesis .ruff_cache outputs
