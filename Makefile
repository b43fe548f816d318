# The commands of the README. Each makes what it needs, the virtual environment included.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
READY := $(VENV)/.ready

.PHONY: demo test crash fuzz test-kernels test-deep test-deployment test-cluster test-gpu bench bench-gpu docs lint clean help

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ —/'

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,demo,bench,fl]'
	touch $@

demo: $(READY)  ## real adapters of different ranks, trained on digits, become one
	$(BIN)/python examples/digits_demo.py --out demo-out

test: lint test-kernels  ## the whole test suite, six to ten minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

# A process of its own: Triton is either interpreter or compiler (tests/test_compile.py).
test-kernels: $(READY)  ## the kernels in Triton's interpreter
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) tests/test_kernel_*.py

GPU := $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
NO_GPU := echo "no GPU (torch.cuda.is_available() is False): skipped, nothing was tried"

test-gpu: $(READY)  ## kernels, accuracy contract, graphs and memory on the device; skips without one
	@if $(GPU); then set -e; \
	GLORA_DEVICE=cuda $(BIN)/python -m pytest tests/test_kernel_*.py tests/test_gpu.py tests/test_aggregate.py tests/test_invariance.py; \
	if command -v compute-sanitizer > /dev/null; then $(BIN)/python bench/gpu_run.py build/memcheck --only memcheck --minutes 20; \
	else echo "no compute-sanitizer on PATH: out-of-bounds accesses were not looked for"; fi; \
	else $(NO_GPU); fi

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test-deep: $(READY)  ## the accuracy contract on at least 10 000 drawn cases
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --hypothesis-profile=deep tests/test_aggregate.py tests/test_invariance.py

crash: $(READY)  ## glora killed 240 times at arbitrary moments, and what is left; some minutes
	$(BIN)/python tests/crash/kills.py

test-cluster: $(READY)  ## jobs on Ray and torchrun, from folders and an S3 store, killed; ten minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster tests/job tests/test_distributed.py

test-deployment: $(READY)  ## a SuperLink and SuperNodes on this machine, killed and restarted; ten minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m deployment tests/fl

SEED ?= 0
COUNT ?= 100000

fuzz: $(READY)  ## COUNT odd inputs of SEED for every parser and the command line; ten minutes
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz.py --seed $(SEED) --count $(COUNT) --jobs $(JOBS)

bench: $(READY)  ## glora beside its peers, interleaved; JSON, then docs/performance.md from it
	$(BIN)/python -m pytest bench --ignore bench/test_gpu.py --benchmark-json bench/results/cpu.json
	$(BIN)/python bench/report_cpu.py bench/results/cpu.json

bench-gpu: $(READY)  ## all there is to learn from a GPU, in nine minutes; skips without one
	@if $(GPU); then \
	$(BIN)/python bench/gpu_run.py bench/results/gpu/$$(date +%Y-%m-%d-%H%M) --minutes 9; ended=$$?; \
	$(BIN)/python bench/report_gpu.py; exit $$ended; else $(NO_GPU); fi

docs: $(READY)  ## the pages as a site in build/site; a broken link is an error
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out
