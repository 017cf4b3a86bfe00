# Two commands are all that a new machine needs: `make bench` and `make test`. Both set up first, from requirements.lock.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 3
TORCH ?=

.PHONY: help setup lock test lint bench results compat clean

help:  ## say what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(VENV)/.installed  ## make the environment from the lock, once per change of pyproject.toml or the lock

$(VENV)/.installed: pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit("attnzoo needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

lock: setup  ## renew requirements.lock: the newest release of everything that pyproject.toml allows
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --upgrade \
		--no-header --quiet --output-file requirements.lock

test: setup  ## run the tests: most side by side, then those that must run alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not serial"
	$(BIN)/python -m pytest -m serial tests/bench

lint: setup  ## check style and types, as CI and pre-commit do
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup  ## run the quickstart benchmark: table, records and report page in runs/quickstart
	$(BIN)/python eval/bench.py configs/bench/quickstart.yaml

results: setup  ## make docs/records/results.html and results.csv from all records there
	$(BIN)/python eval/report.py docs/records

compat: setup  ## run the tests marked compat on every release that compat.toml lists; TORCH=1: on those of torch instead
	$(BIN)/python -m tests.compat $(if $(TORCH),--torch)

clean:  ## remove the environments and all runs
	rm -rf $(VENV) .venv-compat runs build *.egg-info
