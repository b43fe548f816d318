# The commands of the README. Each makes what it needs, the virtual environment included.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
READY := $(VENV)/.ready

.PHONY: demo test test-deep test-deployment bench lint clean help

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ —/'

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,demo,bench,fl]'
	touch $@

demo: $(READY)  ## real adapters of different ranks, trained on digits, become one
	$(BIN)/python examples/digits_demo.py --out demo-out

test: lint  ## the whole test suite, about ten minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test-deep: $(READY)  ## the accuracy contract on at least 10 000 drawn cases
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --hypothesis-profile=deep tests/test_aggregate.py tests/test_invariance.py

test-deployment: $(READY)  ## a SuperLink and SuperNodes on this machine, killed and restarted; ten minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m deployment tests/fl

bench: $(READY)  ## glora beside its peers, interleaved; JSON, table and picture
	$(BIN)/python -m pytest bench --benchmark-json bench/results/cpu.json
	$(BIN)/python bench/report.py bench/results/cpu.json

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out
