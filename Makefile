# The two commands of the README, `make demo` and `make test`, each bring the environment up to date
# first. Everything can be set on the command line, for example for a machine with CUDA 12.8:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cu128
VENV ?= .venv
PYTHON ?= python3.11
# Another release (TORCH=torch==2.14.0) or the path of a wheel.
TORCH ?= $(shell grep '^torch==' constraints.txt)
# PyTorch's index for the build wanted; the CPU's by default, because PyPI's build brings CUDA along.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Optional dependencies to install: dev, gpu, eval.
EXTRAS ?= dev

BIN := $(VENV)/bin
STAMP := $(VENV)/.up-to-date
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --retries 2

.PHONY: setup test demo lint

setup: $(STAMP)

# torch goes first and from its own index; after that, any torch satisfies the other packages.
# Its pin is taken out of the constraints, so that TORCH may name another release.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) install -c $(VENV)/constraints.txt --extra-index-url $(TORCH_INDEX) '$(TORCH)'
	$(PIP) install -c $(VENV)/constraints.txt -e '.[$(EXTRAS)]'
	touch $(STAMP)

# One thread a process: distributed tests run two or more processes at a time.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS)

demo: setup
	$(BIN)/torchrun --nproc-per-node 1 examples/pretrain_refine.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
