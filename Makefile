# Every command sets up what it needs in .venv on first use, and again when the build's inputs change.
# Options go through ARGS: make pretrain ARGS="--steps 50".
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

python := $(VENV)/bin/python
# Bytecode waits for the first import: for all of torch and transformers it is most of an installation.
pip := $(python) -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
# Without any, every process of the tests would compile torch anew. It lies apart for those who want none
# beside sources (many images of Python do).
ifdef PYTHONDONTWRITEBYTECODE
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(abspath $(VENV))/bytecode
endif
inputs := pyproject.toml constraints.txt $(wildcard csrc/*)

.PHONY: help test pretrain check bench clean
.DELETE_ON_ERROR:

help:
	@echo 'make test      build and run the tests'
	@echo 'make pretrain  build and pretrain a small Llama on real text (options: ARGS="--steps 50")'
	@echo 'make check     formatting, lint, types, docstring examples'
	@echo 'make bench     time a step beside other optimizers (options: ARGS="...")'
	@echo 'make clean     remove the virtual environment and everything that was built'

# Processes of several tests share the cores: threads that wait must not spin.
test: $(VENV)/.test
	@OMP_WAIT_POLICY=passive $(python) -m pytest -n $(WORKERS) --dist loadgroup --benchmark-disable $(ARGS)

pretrain: $(VENV)/.pretrain
	@$(python) -m fused_optim pretrain $(ARGS)

check: $(VENV)/.check
	@$(python) -m tests format lint types cpp examples $(ARGS)

bench: $(VENV)/.bench
	@$(python) -m bench step $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .benchmarks

# Built without isolation: pip's throw-away build environments would recompile everything each time.
$(VENV)/.venv: constraints.txt
	@echo 'creating $(VENV)'
	@$(PYTHON) -m venv $(VENV)
	@$(pip) scikit-build-core cmake ninja
	@touch $@

$(VENV)/.pretrain: $(VENV)/.venv $(inputs)
	@echo 'building fused_optim and installing what pretraining needs (minutes the first time)'
	@$(pip) --no-build-isolation --editable '.[pretrain]'
	@touch $@

$(VENV)/.test: $(VENV)/.venv $(inputs)
	@echo 'building fused_optim and installing what the tests need (minutes the first time)'
	@$(pip) --no-build-isolation --editable '.[test]'
	@touch $@ $(VENV)/.pretrain

$(VENV)/.check: $(VENV)/.test
	@$(pip) --no-build-isolation --editable '.[check]'
	@touch $@

# The peers are optional: the benchmark reports a missing one.
$(VENV)/.bench: $(VENV)/.test
	@$(pip) --no-build-isolation --editable '.[bench]' || echo 'not every peer could be installed'
	@touch $@
