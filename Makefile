# The commands of this project; each sets up what it needs. `make help` lists them.

PYTHON ?= python3
# The stack that is installed already, so that a later target does not replace it.
STAMPED := $(word 2,$(subst -, ,$(notdir $(firstword $(wildcard .venv/.installed-*)))))
GPU    ?= $(or $(STAMPED),cpu)
ARCHS  ?= native
GPUS   ?= 10
VENV   := .venv
BIN    := $(VENV)/bin
STACKS := cpu cuda12 cuda13
FILES  := $(firstword $(shell find lightmoe -name '*.py' | LC_ALL=C sort | cksum))
STAMP  := $(VENV)/.installed-$(GPU)-$(FILES)
comma  := ,
EXTRAS := test,plot$(if $(filter cuda%,$(GPU)),$(comma)$(GPU))

ifeq ($(filter $(GPU),$(STACKS)),)
$(error GPU=$(GPU) is unknown; give one of: $(STACKS) (cuda12: NVIDIA driver 525 to 579, cuda13: 580 and later))
endif

.PHONY: help install kernels launch test check wheel clean
.DEFAULT_GOAL := help

help:  ## list the commands
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18
	@echo "Options: GPU=cpu|cuda12|cuda13  PYTHON=python3.12  ARCHS=75,90  GPUS=4  TORCH_INDEX=URL  ARGS=\"...\" (for launch and test)"

install: $(STAMP)  ## make .venv with the package (editable) and everything the tests need

kernels: install  ## build liblight_ops and its kernels for ARCHS, by default the cards here
	$(BIN)/python cute_kernels/build.py --arch $(ARCHS)

launch: install  ## serve models/mixtral-lite on GPUS=10 ranks at http://127.0.0.1:8000
	$(BIN)/lightmoe launch --gpus $(GPUS) --model mixtral-lite $(ARGS)

test: install  ## run the tests
	$(BIN)/python -m pytest $(ARGS)

check: install  ## layering, lint, types
	$(BIN)/lint-imports
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: install  ## build dist/*.whl
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist lightmoe/kernels/lib .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find lightmoe cute_kernels tests benchmarks -name __pycache__ -type d -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is not Python 3.11 or later; install one and give it: make install PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 1; }

# The stamp carries the stack's name: after GPU=cuda12, a plain make install installs again. And a
# checksum of the list of modules: an editable install remembers which file each module is in.
$(STAMP): pyproject.toml CMakeLists.txt cute_kernels/cpu/route.cpp constraints/common.txt constraints/$(GPU).txt | $(BIN)/python
ifdef TORCH_INDEX
	$(BIN)/python -m pip install --no-deps --index-url $(TORCH_INDEX) --constraint constraints/$(GPU).txt torch
endif
	$(BIN)/python -m pip install --constraint constraints/$(GPU).txt --editable '.[$(EXTRAS)]'
	@rm -f $(VENV)/.installed-*
	@touch $@
