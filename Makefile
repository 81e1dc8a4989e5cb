# The commands of the README, `make demo`, `make test` and `make gpu-check`, each bring the environment
# up to date first. Everything can be set on the command line.
VENV ?= .venv
PYTHON ?= python3.11
# Which torch. On a GPU machine: another release (TORCH=torch==2.14.0), the path of a wheel, or
# with TORCH_INDEX the address of an index that has the build wanted.
TORCH ?= $(shell grep '^torch==' constraints.txt)
TORCH_INDEX ?=
# Optional dependencies to install, with commas: dev, gpu, eval, hf; `make demo` asks for none.
EXTRAS ?= dev
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.up-to-date$(EXTRAS:%=-%)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: setup test demo lint gpu-check

setup: $(STAMP)

# torch goes first: once it is there, no other package pulls in another build of it. Its pin is
# taken out of the constraints, so that TORCH may name another release; Triton's counts where torch
# did not bring one of its own, as builds for GPUs do.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	grep -vE '^(torch|triton)==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) install -c $(VENV)/constraints.txt $(addprefix --index-url ,$(TORCH_INDEX)) '$(TORCH)'
	$(BIN)/python -c 'import triton' 2> /dev/null || \
		grep '^triton==' constraints.txt >> $(VENV)/constraints.txt
	$(PIP) install -c $(VENV)/constraints.txt -e '.$(EXTRAS:%=[%])'
	touch $(STAMP)

# One thread a process: distributed tests run two or more processes at a time. WORKERS files of
# tests run beside each other, then those that must be alone. TESTS are options of pytest instead.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest
test: setup
ifdef TESTS
	$(PYTEST) $(TESTS)
else
	$(PYTEST) -n $(WORKERS) --dist loadfile -m "not slow and not alone"
	$(PYTEST) -m "not slow and alone"
endif

# MODEL: gated, lact or qwen3.5 instead of a DeltaNet.
demo:
	$(MAKE) setup EXTRAS=
	$(BIN)/torchrun --nproc-per-node 1 examples/pretrain_refine.py \
		--config examples/configs/demo$(MODEL:%=_%).yaml

# CHECK holds options, such as --device cpu or --only operations,steps.
gpu-check: setup
	$(BIN)/python tools/gpu_check.py $(CHECK)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
