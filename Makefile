# Two commands are all that a new machine needs: `make bench` and `make test`. Both set up first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= dev

.PHONY: help setup test lint bench clean

help:  ## say what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(VENV)/.installed  ## make the environment, once per change of pyproject.toml

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("attnzoo needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[$(EXTRAS)]'
	@touch $@

test: setup  ## run the tests
	$(BIN)/python -m pytest

lint: setup  ## check style and types, as CI and pre-commit do
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup  ## run the quickstart benchmark: table, records and report page in runs/quickstart
	$(BIN)/python eval/bench.py configs/bench/quickstart.yaml

clean:  ## remove the environment and all runs
	rm -rf $(VENV) runs build *.egg-info
