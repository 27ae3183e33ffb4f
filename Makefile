# Everything a user or developer runs. `make demo` and `make test` set up what they need.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
RUN := .venv/bin/python -m
export OMP_NUM_THREADS ?= 1

.PHONY: help setup setup-te setup-sglang setup-sglang-next setup-router setup-launch slurm-up slurm-down demo test test-all \
    check format gpu clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/python -m pip install --quiet --disable-pip-version-check "uv>=0.9"

.venv/.locked: pyproject.toml uv.lock .python-version | $(filter .uv/bin/uv,$(UV))
	$(UV) sync --locked $(if $(wildcard .venv/.te),--extra te)
	@touch $@

setup: .venv/.locked  ## the trainer's environment, from uv.lock, in .venv

# uv makes an environment exactly what it is asked for: the mark lets a later setup ask for the same.
.venv/.te: pyproject.toml uv.lock .python-version | setup
	$(UV) sync --locked --extra te
	@touch $@

setup-te: .venv/.te  ## Transformer Engine in .venv, for GPUs: compiled here, which takes nvcc and minutes

SGLANG_ENV := prefixrl_mcore/rollout/sglang/env
.venv-sglang/.locked: $(wildcard $(SGLANG_ENV)/*.lock) $(SGLANG_ENV)/setup.sh | setup
	$(SGLANG_ENV)/setup.sh $(UV) .venv/bin/python .venv-sglang $(SGLANG)
	@touch $@

setup-sglang: .venv-sglang/.locked  ## SGLang's own environment, in .venv-sglang (SGLANG=gpu on a login node without one)

.venv-sglang-next/.locked: $(wildcard $(SGLANG_ENV)/*.lock) $(SGLANG_ENV)/setup.sh | setup
	$(SGLANG_ENV)/setup.sh $(UV) .venv/bin/python .venv-sglang-next cpu-next
	@touch $@

setup-sglang-next: .venv-sglang-next/.locked  ## the newest SGLang that is supported, for the tests

.venv-router/.locked: $(SGLANG_ENV)/requirements-router.lock | setup
	$(UV) venv --quiet --allow-existing --python .venv/bin/python .venv-router
	$(UV) pip sync --quiet --require-hashes --no-build --python .venv-router/bin/python $<
	@touch $@

setup-router: .venv-router/.locked  ## SGLang's router, for the tests

LAUNCH_ENV := prefixrl_mcore/launch/env
.venv-launch/.locked: $(LAUNCH_ENV)/requirements.lock $(LAUNCH_ENV)/setup.sh | setup
	$(LAUNCH_ENV)/setup.sh $(UV) .venv/bin/python .venv-launch
	@touch $@

setup-launch: .venv-launch/.locked  ## NeMo-Run's own environment, for prefixrl launch, in .venv-launch

# Options of the cluster: make slurm-up SLURM="--nodes 2 --gpus 8 --accounting"
SLURM ?=
slurm-up:  ## a Slurm cluster on this machine, as root (slurm/testing/install.sh installs Slurm)
	@python3 slurm/testing/cluster.py up $(SLURM)

slurm-down:  ## end that cluster and everything that runs on it
	@python3 slurm/testing/cluster.py down

demo: setup setup-sglang  ## the whole of PrefixRL on this CPU, with a report at the end
	.venv/bin/prefixrl demo

test: setup setup-sglang setup-launch  ## the test suite (CPU)
	$(RUN) pytest

test-all: setup setup-sglang setup-sglang-next setup-router setup-launch  ## the test suite with the slow proofs, as CI runs it
	$(RUN) pytest -m "not gpu and not multi_gpu"

check: setup setup-sglang setup-launch  ## format, lint, types, tests: green before every commit
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright
	$(RUN) pytest

format: setup  ## format and fix what ruff can fix
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

# Another interpreter, on a bare machine with torch, triton, pytest and pytest-timeout, rich and
# matplotlib: make gpu PYTHON=python3. It has no trainer, so that the trainer's GPU tests stay out;
# peers that it does not have are recorded as not installed. The whole sweep: make gpu BENCH=
PYTHON ?= .venv/bin/python
BENCH ?= --quick
ifeq ($(PYTHON),.venv/bin/python)
GPU_NEEDS := setup .venv-bench/.locked
BENCH_PYTHON ?= .venv-bench/bin/python
else
BENCH_PYTHON ?= $(PYTHON)
endif
KERNEL_TESTS := tests/kernels $(wildcard tests/gpu/test_head_*.py tests/gpu/test_linear_*.py)

.venv-bench/.locked: pyproject.toml uv.lock .python-version | setup
	UV_PROJECT_ENVIRONMENT=.venv-bench $(UV) sync --locked --group bench
	@touch $@

# Transformer Engine's binding to torch is compiled when it is installed, which takes nvcc and
# minutes; nothing else may depend on that.
.venv-te/.locked: pyproject.toml uv.lock .python-version | setup
	UV_PROJECT_ENVIRONMENT=.venv-te $(UV) sync --locked --extra te
	@touch $@

# Layouts: over NCCL as far as there is a GPU for every rank, the others over gloo.
RANK_TESTS := $(addprefix tests/distributed/test_,policy_on_ranks.py invariance_on_ranks.py \
    reference_on_ranks.py checkpoint_on_ranks.py)

# Commands of the recipe below. Each is run whatever became of those before it, so that a machine
# is not lost to one failing test; the target fails at the end if any of them did.
ifneq ($(GPU_NEEDS),)
define GPU_TRAINER_TESTS
mkdir -p runs; \
run $(PYTHON) -m tests.support.memory_table --json runs/memory_gpu.json; \
if $(PYTHON) -c 'import sys, torch; sys.exit(torch.cuda.device_count() < 2)'; then \
    run $(PYTHON) -m pytest -m "not gpu" $(RANK_TESTS); \
else \
    echo "make gpu: one CUDA device: no layout is tested over NCCL"; \
fi; \
run $(PYTHON) -m pytest -m gpu $(filter-out $(KERNEL_TESTS),$(wildcard tests/gpu/test_*.py));
endef
define GPU_TRAINER_BENCH
if $(MAKE) --no-print-directory .venv-te/.locked; then \
    run .venv-te/bin/python -m pytest -m gpu tests/gpu/te; \
    run .venv-te/bin/python -m bench.policy; \
else \
    echo "Transformer Engine cannot be installed here: the local layers only"; \
    run $(PYTHON) -m bench.policy; \
fi; \
if $(MAKE) --no-print-directory .venv-sglang/.locked; then \
    run $(PYTHON) -m bench.rollout; \
else \
    status=1; echo "make gpu: SGLang's environment cannot be made: no rollouts are measured"; \
fi;
endef
endif

gpu: export PREFIXRL_REQUIRE_GPU := 1
gpu: export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels
gpu: $(GPU_NEEDS)  ## everything that wants a GPU: tests that may not skip, then the benchmark
	@$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() \
	    else "make gpu: PyTorch sees no CUDA device, and nothing here may pass without one")'
	@status=0; \
	run() { echo "$$*"; "$$@" || { status=1; echo "make gpu: failed: $$*"; }; }; \
	$(GPU_TRAINER_TESTS) \
	run $(PYTHON) -m pytest -m "not multi_gpu" $(KERNEL_TESTS); \
	run $(BENCH_PYTHON) -m bench.head $(BENCH); \
	run $(BENCH_PYTHON) -m bench.report; \
	$(GPU_TRAINER_BENCH) \
	exit $$status

clean:  ## remove caches and run folders; environments stay
	rm -rf runs .pytest_cache .ruff_cache
