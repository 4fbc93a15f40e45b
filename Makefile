# Two commands do everything on a fresh machine: `make bench` (the main job) and `make test`.
# Both build .venv once and reuse it.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PY ?= $(VENV)/bin/python
STAMP := $(VENV)/.installed
EXTRAS := bench,hf,examples,dev
JOBS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PYTHONPATH := $(CURDIR)

.PHONY: help install test test-slow test-all coverage matrix mutation fuzz sanitize bench gpu inspect-matrix lint format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 16

# an interpreter handed in by PY= brings its own packages: no venv is built for it
ifeq ($(PY),$(VENV)/bin/python)
READY := $(STAMP)
endif

install: $(STAMP)  ## build .venv with everything

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@PYTHON="$(PYTHON)" VENV="$(VENV)" CONSTRAINTS="$(CONSTRAINTS)" EXTRAS="$(EXTRAS)" sh .ci/install
	@touch $@

test: $(READY)  ## the tests that need no GPU (Triton kernels in its CPU interpreter)
	$(PY) -m pytest -n $(JOBS) -m "not gpu and not slow" -q

test-slow: $(READY)  ## the long sweeps that `make test` leaves out
	$(PY) -m pytest -n $(JOBS) -m "not gpu and slow" -q

test-all: test test-slow  ## both

coverage: $(READY)  ## lines and branches of fastops/ that the fast tests run; fails under 95 %
	rm -f .coverage .coverage.*
	$(PY) -m coverage run -m pytest -n $(JOBS) -m "not gpu and not slow" -q
	$(PY) -m coverage combine -q
	$(PY) -m coverage report

matrix: $(READY)  ## the tests under other versions of Python, torch, Triton, and without kernels; CELLS=, FULL=1
	@JOBS="$(JOBS)" $(PY) .ci/matrix.py

mutation: $(READY)  ## do the tests notice small faults in dispatch, limits and lengths? FILES= names some
	@JOBS="$(JOBS)" $(PY) .ci/mutation.py $(FILES)

fuzz: $(READY)  ## random calls of every op against stock, FUZZ_EXAMPLES= of each (10000); goes on where it stopped
	$(PY) -m tests.fuzz --examples $(or $(FUZZ_EXAMPLES),10000) --jobs $(JOBS) $(FUZZ)

sanitize: $(READY)  ## compute-sanitizer over a small suite of every kernel; needs a GPU and the CUDA toolkit
	$(PY) .ci/sanitize

bench: $(READY)  ## the benchmark: GPU timings where there is a GPU, CPU timings and static figures elsewhere
	$(PY) -m bench

gpu: $(READY)  ## GPU tests, then the GPU suite; JSON as it goes under OUT= (default bench-results/), under 9 minutes
	$(PY) -m bench.gpu

inspect-matrix: $(READY)  ## the static gate under Triton 3.6.0, installed side by side; VERSIONS= names others
	@PY="$(PY)" .ci/inspect-matrix

lint: $(READY)  ## ruff (check and format) and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY)  ## let ruff rewrite what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:  ## remove the environment and caches
	rm -rf $(VENV) .venv-matrix .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks bench-results build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
