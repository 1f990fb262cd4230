# make test        the environment, then the ordinary tests (no GPU needed)
# make test-all    the slow ones too
# make test-gpu    the tests that need an NVIDIA GPU, kernels compiled
# make check       format, lint and types
# make compile-report, make compile-matrix   what the compiler makes of every kernel, without a GPU

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One process a core; each runs its own tensors on one thread.
JOBS ?= auto
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)
TRITONS := 3.6.0 3.7.1 3.9.0

.PHONY: test test-all test-gpu check format compile-report compile-matrix clean
.DELETE_ON_ERROR:

test: $(VENV)/.ready
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.ready
	$(PYTEST)

test-gpu: $(VENV)/.ready
	$(BIN)/python -m pytest -m gpu

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

compile-report: $(VENV)/.ready
	$(BIN)/python -m benchmarks.compile_report

# Each Triton lies in a folder of its own and shadows the environment's.
compile-matrix: $(VENV)/.ready $(TRITONS:%=.triton-%/.ready)
	@for version in $(TRITONS); do \
		PYTHONPATH=.triton-$$version TRITON_CACHE_DIR=.triton-$$version/cache \
			$(BIN)/python -m benchmarks.compile_report || exit 1; \
	done

.triton-%/.ready: | $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --no-deps --target .triton-$* triton==$*
	@touch $@

# Made anew when what it is made of changes; otherwise found ready.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) .triton-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
