# Everything that a person or CI runs here. `make help` lists it.
#
# Three settings: PYTHON is the Python that the environment is made with, VENV where it is made (`make
# clean` first after changing PYTHON), WORKERS how many processes share the tests of the CPU.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

python := $(VENV)/bin/python
pytest := $(python) -m pytest -q
# The set-up is repeated when one of these changes, the build when one of the sources does.
installed := $(VENV)/.installed
dev := $(VENV)/.installed-dev
built := $(VENV)/.built
sources := pyproject.toml setup.py ppmoe_ops/_version.py $(shell find csrc -name '*.py' \
    -o -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup report train train-pslt train-lion test test-cpu test-interpret test-compile test-gpu \
    wheel sanitize lint fuzz mutate matrix ci clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*  ## (.*)/\1|\2/' \
	    | awk -F'|' '{ printf "  make %-15s %s\n", $$1, $$2 }'

# --- set-up ---------------------------------------------------------------------------------------

$(installed): requirements.txt .ci/environment.py
	@$(PYTHON) .ci/environment.py $(VENV) requirements.txt
	@touch $@

$(dev): requirements-dev.txt $(installed)
	@$(PYTHON) .ci/environment.py $(VENV) requirements-dev.txt
	@touch $@

$(built): $(sources) $(installed)
	@echo "set-up: building the kernels (2 to 3 minutes on 2 cores; MAX_JOBS=1 if memory is short)"
	@$(python) -m pip install -qq --no-build-isolation --no-deps -e .
	@$(python) -c "from ppmoe_ops._load import build_info; print(*build_info()['summary'], sep='\n')"
	@touch $@

setup: $(built) $(dev)  ## the environment and the build alone; everything else begins with it

# --- what people run ------------------------------------------------------------------------------

report: $(built)  ## quick benchmark of every operator: reports/index.html, reports/report.md
	@$(python) -m ppmoe_ops.bench report

train: setup  ## a small language model with experts, beside a dense one, 4 minutes: runs/
	$(python) -m ppmoe_models.train_lm --compare-dense

train-pslt: setup  ## a small PSLT on hand-written digits, with and without shifts, 4 minutes: runs/
	$(python) -m ppmoe_models.train_pslt --compare-unshifted

train-lion: setup  ## LION and six other ways to tune a frozen backbone on new digits, 4 minutes: runs/
	$(python) -m ppmoe_models.train_lion

test: test-cpu test-interpret test-compile test-gpu  ## all tests that can run here

test-cpu: setup  ## kernels, contracts, documents and the build, on the CPU
	$(pytest) -n $(WORKERS) --dist worksteal tests \
	    --ignore=tests/interpret --ignore=tests/compile --ignore=tests/gpu

test-interpret: setup  ## Triton kernels on CPU tensors, by Triton's interpreter
	TRITON_INTERPRET=1 $(pytest) -n $(WORKERS) --dist worksteal tests/interpret

test-compile: setup  ## every Triton and CUDA kernel compiled for GPUs; needs no GPU
	$(pytest) -n $(WORKERS) --dist loadfile tests/compile

test-gpu: setup  ## kernels on the GPU, where there is one
	@if $(python) -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then \
	    $(pytest) tests/gpu; \
	else \
	    echo "gpu tier: no GPU here"; \
	fi

# --- what CI runs besides -------------------------------------------------------------------------

ci: test wheel sanitize lint  ## what a change must pass: lint, test, sanitize, wheel

lint: setup  ## ruff, mypy, clang-format, bash -n
	@bash .ci/lint.sh $(python)

wheel: setup  ## sdist, isolated wheel, its symbols, and a smoke test in an empty environment
	$(python) tests/check_wheel.py --out dist

sanitize: setup  ## the CPU tests under Address- and UndefinedBehaviourSanitizer
	PYTHON=$(abspath $(python)) WORKERS=$(WORKERS) bash tests/sanitize.sh

# --- by hand --------------------------------------------------------------------------------------

fuzz: setup  ## 20,000 random calls of expert_ffn, forward and backward (ten minutes)
	$(python) tests/fuzz.py --calls 20000

mutate: setup  ## one planted bug in each kernel at a time: a test must fail (half an hour)
	$(python) tests/mutate.py

matrix: setup  ## the tests under each instruction set, backend and compiler (hours)
	PYTHON=$(abspath $(python)) bash tests/matrix.sh

clean:  ## remove the environment and everything that was built or written
	rm -rf $(VENV) build dist reports runs *.egg-info .hypothesis .benchmarks .pytest_cache .ruff_cache \
	    .mypy_cache ppmoe_ops/*.so ppmoe_ops/_build_info.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
