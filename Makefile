# make train      train a small language model on real text, beside the plain baseline
# make generate   train a small language model, then write text with any chain of transforms
# make test       what a change must pass: the oldest supported versions, the newest jax, kernels on jax 0.11
# make test-fast  a part of it for daily work, in minutes
# make test-all   every law on every case, see CONTRIBUTING.md; hours
# make mutate     tests the tests: each slip of tests/mutations must be caught; a quarter of an hour
# make lint       ruff and pyright
# make kernels    compiles the GPU kernels and compares their machine code with the accepted one; needs no GPU, 300 MB
# make bench      the measurements that README.md reports
# make docs       the documentation, into site/; a broken link is an error
#
# Everything is set up in .venv, .venv-newest, .venv-kernels and .venv-cuda; nothing outside this folder is touched.

SHELL := /bin/bash
# The oldest supported Python if it is there, else whatever python3 is.
PYTHON ?= $(shell for p in python3.11 python3; do if $$p -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null; then echo $$p; break; fi; done)
# Newer ones, on PATH or under pyenv: for the newest jax, and for the versions that kernels are run with on GPUs.
find = $(shell for v in $(1); do for p in python$$v $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$v.*/bin/python; do if $$p -c 'import venv' 2>/dev/null; then echo $$p; exit; fi; done; done)
NEWEST_PYTHON ?= $(call find,3.14 3.13 3.12)
KERNELS_PYTHON ?= $(call find,3.12)
KERNELS_JAX = 0.11.2
# The independent implementations the tests compare with (torch is large): `make test ORACLES=` goes without.
ORACLES ?= ,oracles
WORKERS ?= 2
TRAIN_FLAGS ?=
GENERATE_FLAGS ?=
MUTATE_FLAGS ?=
KERNELS_FLAGS ?=

# Without compiling whole packages of which little is imported: half of the time.
PIP = -m pip install --quiet --disable-pip-version-check --no-compile
PART = @$(PYTHON) tests/parts.py
PYTEST = -m pytest -n $(WORKERS)
LOWERING_TESTS = tests/kernels/test_lowering.py tests/kernels/test_derivatives.py
KERNEL_TESTS = tests/kernels/test_gpu.py tests/kernels/test_inside.py $(LOWERING_TESTS)

.PHONY: train generate test test-all test-fast test-oldest test-newest test-kernels mutate lint kernels bench docs environments clean

train: .venv/ready
	.venv/bin/python examples/train_lm.py $(TRAIN_FLAGS)

generate: .venv/ready
	.venv/bin/python examples/generate.py $(GENERATE_FLAGS)

test: export JAXSOFT_DESIGN = cover
test: NEWEST_DESIGN = newest
test-all: export JAXSOFT_DESIGN = all
test-all: NEWEST_DESIGN = all
test test-all: test-oldest test-newest test-kernels
	@echo "make $@: $$(.venv/bin/python tests/versions.py): passed"
	@for part in newest kernels; do \
	  if [ -x .venv-$$part/bin/python ]; then echo "make $@: $$(.venv-$$part/bin/python tests/versions.py): passed (a part)"; \
	  else echo "make $@: no newer Python found, so the $$part tests did NOT run on a newer jax"; fi; done
	$(PART)

test-oldest: .venv/ready-tests
	$(PART) "all tests on the oldest versions" .venv/bin/python $(PYTEST) --doctest-modules jaxsoft tests

ifneq ($(NEWEST_PYTHON),)
test-newest: .venv-newest/ready-tests
	$(PART) "engine, laws and optimizers on the newest jax" env JAXSOFT_DESIGN=$(or $(NEWEST_DESIGN),newest) \
	  .venv-newest/bin/python $(PYTEST) tests/rows tests/conformance/test_laws.py tests/optimizers/test_common.py $(LOWERING_TESTS)
else
test-newest:
	@echo "== no Python 3.12 or newer found (PATH, pyenv): the newest jax is NOT tested"
endif

ifneq ($(KERNELS_PYTHON),)
test-kernels: .venv-kernels/ready-tests
	$(PART) "kernels on jax $(KERNELS_JAX)" .venv-kernels/bin/python $(PYTEST) $(KERNEL_TESTS)
else
test-kernels:
	@echo "== no Python 3.12 found (PATH, pyenv): kernels are NOT tested on jax $(KERNELS_JAX)"
endif

test-fast: .venv/ready-tests
	$(PART) "fast tests" env JAXSOFT_DESIGN=fast .venv/bin/python $(PYTEST) -m "not slow" \
	  tests/test_imports.py tests/test_static_options.py tests/conformance tests/optimizers/test_common.py

mutate: .venv/ready-tests
	.venv/bin/python tests/mutate.py --workers $(WORKERS) $(MUTATE_FLAGS)

lint: .venv/ready-tests
	$(PART) "ruff" .venv/bin/ruff check .
	$(PART) "ruff format" .venv/bin/ruff format --check .
	$(PART) "pyright" .venv/bin/pyright --pythonpath .venv/bin/python

ifneq ($(KERNELS_PYTHON),)
kernels: .venv-cuda/ready
	PYTHONPATH=$(CURDIR) .venv-cuda/bin/python benchmarks/compiled.py $(KERNELS_FLAGS)
else
kernels:
	@echo "make kernels: no Python 3.12 found (PATH, pyenv)"; exit 1
endif

bench: .venv/ready
	.venv/bin/python benchmarks/linear_cross_entropy.py
	.venv/bin/python benchmarks/attention.py
	.venv/bin/python benchmarks/normalizers.py
	.venv/bin/python benchmarks/norms.py
	.venv/bin/python benchmarks/train_normalizers.py
	.venv/bin/python benchmarks/two_heads.py
	.venv/bin/python benchmarks/mixed_precision.py
	.venv/bin/python benchmarks/optimizer_step.py
	.venv/bin/python benchmarks/zeroth_order.py
	.venv/bin/python benchmarks/decoding.py
	.venv/bin/python benchmarks/heads.py
	.venv/bin/python benchmarks/hostile_training.py
	.venv/bin/python benchmarks/accelerator.py

docs: .venv/ready-docs
	$(PART) "the docs" .venv/bin/mkdocs build --strict

# ---- environments

environments: .venv/ready-tests $(if $(NEWEST_PYTHON),.venv-newest/ready-tests) $(if $(KERNELS_PYTHON),.venv-kernels/ready-tests)

.venv/ready: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv .venv
	$(PART) "set-up" .venv/bin/python $(PIP) -c tests/oldest.txt -e '.[examples,bench]'
	@touch $@

.venv/ready-tests: .venv/ready
	$(PART) "set-up of the tests" .venv/bin/python $(PIP) -c tests/oldest.txt -e '.[tests$(ORACLES)]'
	@touch $@

.venv/ready-docs: .venv/ready
	$(PART) "set-up of the docs" .venv/bin/python $(PIP) -c tests/oldest.txt -e '.[docs]'
	@touch $@

.venv-newest/ready-tests: pyproject.toml
	$(NEWEST_PYTHON) -m venv .venv-newest
	$(PART) "set-up of the newest jax" .venv-newest/bin/python $(PIP) --upgrade --upgrade-strategy eager -e '.[tests]'
	@touch $@

.venv-kernels/ready-tests: pyproject.toml
	$(KERNELS_PYTHON) -m venv .venv-kernels
	$(PART) "set-up of jax $(KERNELS_JAX)" .venv-kernels/bin/python $(PIP) 'jax==$(KERNELS_JAX)' -e '.[tests]'
	@touch $@

# The compiler of GPU code comes with JAX's CUDA plugin, which works without a GPU.
.venv-cuda/ready: pyproject.toml
	$(KERNELS_PYTHON) -m venv .venv-cuda
	$(PART) "set-up of the compiler for GPUs" .venv-cuda/bin/python $(PIP) 'jax==$(KERNELS_JAX)' \
	  'jax-cuda12-plugin==$(KERNELS_JAX)' 'jax-cuda12-pjrt==$(KERNELS_JAX)' nvidia-cuda-nvcc-cu12 nvidia-cuda-nvdisasm -e .
	@touch $@

clean:
	rm -rf .venv .venv-newest .venv-kernels .venv-cuda build site runs
