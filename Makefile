# make train   train a small language model on real text, beside the plain baseline
# make test    all tests: on the oldest supported versions, and on the newest jax if a newer Python is found
# make mutate  tests the tests: slips of a maintainer, each of which some test must catch; not a part of make test
# make lint    ruff and pyright
# make bench   the measurements that README.md reports
# make docs    the documentation, into site/; a broken link is an error
#
# Everything is set up in .venv (and .venv-newest); nothing outside this folder is touched.

SHELL := /bin/bash
# The oldest supported Python if it is there, else whatever python3 is.
PYTHON ?= $(shell for p in python3.11 python3; do if $$p -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null; then echo $$p; break; fi; done)
# A newer one, on PATH or under pyenv, for the newest jax.
NEWEST_PYTHON ?= $(shell for v in 3.14 3.13 3.12; do for p in python$$v $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$v.*/bin/python; do if $$p -c 'import venv' 2>/dev/null; then echo $$p; exit; fi; done; done)
# The independent implementations the tests compare with (torch is large): `make test ORACLES=` goes without.
ORACLES ?= ,oracles
WORKERS ?= 2
TRAIN_FLAGS ?=
MUTATE_FLAGS ?=

PIP = -m pip install --quiet --disable-pip-version-check

.PHONY: train test test-oldest test-newest mutate lint bench docs clean

train: .venv/ready
	.venv/bin/python examples/train_lm.py $(TRAIN_FLAGS)

test: test-oldest test-newest
	@echo "make test: $$(.venv/bin/python tests/versions.py): passed"
	@if [ -x .venv-newest/bin/python ]; then echo "make test: $$(.venv-newest/bin/python tests/versions.py): passed (engine, kernels, conformance, optimizers)"; \
	else echo "make test: no Python 3.12 or newer found, so the newest jax was NOT tested"; fi

test-oldest: .venv/ready-tests
	@echo "== all tests on $$(.venv/bin/python tests/versions.py)"
	.venv/bin/python -m pytest -n $(WORKERS) --doctest-modules jaxsoft tests

ifneq ($(NEWEST_PYTHON),)
test-newest: .venv-newest/ready-tests
	@echo "== engine, kernel, conformance and optimizer tests on $$(.venv-newest/bin/python tests/versions.py)"
	JAXSOFT_LAWS=engine .venv-newest/bin/python -m pytest -n $(WORKERS) tests/rows tests/kernels/test_gpu.py tests/kernels/test_lowering.py tests/conformance tests/optimizers/test_common.py
else
test-newest:
	@echo "== no Python 3.12 or newer found (PATH, pyenv): the newest jax is not tested"
endif

mutate: .venv/ready-tests
	.venv/bin/python tests/mutate.py --workers $(WORKERS) $(MUTATE_FLAGS)

lint: .venv/ready-tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python

bench: .venv/ready
	.venv/bin/python benchmarks/linear_cross_entropy.py
	.venv/bin/python benchmarks/attention.py
	.venv/bin/python benchmarks/normalizers.py
	.venv/bin/python benchmarks/train_normalizers.py
	.venv/bin/python benchmarks/two_heads.py
	.venv/bin/python benchmarks/mixed_precision.py
	.venv/bin/python benchmarks/optimizer_step.py
	.venv/bin/python benchmarks/zeroth_order.py
	.venv/bin/python benchmarks/hostile_training.py
	.venv/bin/python benchmarks/accelerator.py

docs: .venv/ready-docs
	.venv/bin/mkdocs build --strict

.venv/ready: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) -c tests/oldest.txt -e '.[examples,bench]'
	@touch $@

.venv/ready-tests: .venv/ready
	.venv/bin/python $(PIP) -c tests/oldest.txt -e '.[tests$(ORACLES)]'
	@touch $@

.venv/ready-docs: .venv/ready
	.venv/bin/python $(PIP) -c tests/oldest.txt -e '.[docs]'
	@touch $@

.venv-newest/ready-tests: pyproject.toml
	$(NEWEST_PYTHON) -m venv .venv-newest
	.venv-newest/bin/python $(PIP) --upgrade --upgrade-strategy eager -e '.[tests]'
	@touch $@

clean:
	rm -rf .venv .venv-newest site runs
