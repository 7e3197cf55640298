# This file needs Python 3.11 or newer, and a network connection for the first run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# what .venv holds, in addition to the one before: the core, the extra `demo`, all that the tests need
CORE := $(VENV)/.core
DEMO := $(VENV)/.demo
INSTALLED := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# Neighboring tests run in one process, and share its fixtures. A process without work takes tests from the other one.
ON_TWO_CORES := -n 2 --dist worksteal

# environments with the lowest and the newest versions that the package is tested with
LOWEST := .venv-lowest
NEWEST := .venv-newest
# what depends on versions; TESTS=tests runs everything
TESTS = tests/kernels tests/modeling_evmamba tests/training_evmamba/test_augmentation*.py \
	tests/hub_scripts/evmamba_hub/cli/test_names.py tests/hub_scripts/evmamba_hub/inference/test_classify.py

.PHONY: help install classify demo test test-slow test-triton test-gpu test-wheel test-lowest test-newest bench-gpu \
	digits docs lock quality style clean

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## Create .venv, and install the package with all that its tests need.

$(CORE): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "EfficientVMamba needs Python 3.11 or newer, but $(PYTHON) is Python %d.%d: choose another one, as in make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "Installing the package with PyTorch, transformers and Numba into $(VENV). It takes minutes, and more than 1 GB; with PyTorch for CUDA, several GB."
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e .
	touch $@

$(DEMO): $(CORE)
	$(PIP_INSTALL) -e ".[demo]"
	touch $@

$(INSTALLED): $(CORE)
	$(PIP_INSTALL) -e ".[test]"
	touch $@

classify: $(CORE)  ## Classify the example images with the bundled model.
	$(BIN)/evmamba classify demo/examples --top-k 3

demo: $(DEMO)  ## Serve the demo of the bundled model on http://127.0.0.1:7860.
	$(BIN)/evmamba demo

test: $(INSTALLED)  ## Run all tests except the slow ones and the test of the wheel.
	$(BIN)/python -m pytest $(ON_TWO_CORES)

test-slow: $(INSTALLED)  ## Run the slow tests, which compile, train on several processes, or kill runs.
	$(BIN)/python -m pytest $(ON_TWO_CORES) -m slow

test-triton: $(INSTALLED)  ## Run the tests of the GPU kernels in Triton's interpreter, without a GPU.
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(ON_TWO_CORES) -k triton tests/kernels

test-gpu: $(INSTALLED)  ## Run the GPU tests of kernels, networks and training on a CUDA GPU.
	EVMAMBA_TEST_DEVICE=cuda $(BIN)/python -m pytest -k "triton or gpu" tests/kernels
	EVMAMBA_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/modeling_evmamba/test_modeling_evmamba_gpu.py
	EVMAMBA_TEST_DEVICE=cuda $(BIN)/python -m pytest -k golden tests/modeling_evmamba
	$(BIN)/python -m pytest tests/transformers_suites
	$(BIN)/python -m pytest -k learns_and_leaves tests/training_evmamba

test-wheel: $(INSTALLED)  ## Build the wheel, install it into a clean environment, and test it there.
	$(BIN)/python -m pytest -m wheel

$(LOWEST)/.installed: PYTHON = python3.11
$(NEWEST)/.installed: PYTHON = python3.13
.venv-%/.installed: setup.cfg pyproject.toml constraints-%.txt
	@echo "Installing the $* versions into .venv-$*. It takes minutes, and about 8 GB with PyTorch for CUDA."
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-$*/bin/uv pip install --system-certs --quiet --python .venv-$* -c constraints-$*.txt -e ".[test,timm]"
	touch $@

test-newest: TESTS += tests/transformers_suites
# Numba's cache does not tell versions of Numba apart.
test-lowest test-newest: test-%: .venv-%/.installed
	NUMBA_CACHE_DIR=$(CURDIR)/.venv-$*/numba .venv-$*/bin/python -m pytest $(ON_TWO_CORES) $(TESTS)

test-lowest:  ## Run the tests that depend on versions with Python 3.11 and the lowest versions.
test-newest:  ## Run the tests that depend on versions with Python 3.13, and the newest versions with timm.

# feature maps of stages 1 and 2 of T, S and B, for images of 224 x 224
MAPS := 56,56,96 28,28,192 56,56,128 28,28,256 56,56,192 28,28,384

TRITON_CONSTANTS := forward_tile backward_tile forward_programs backward_programs precision chunk_cost

bench-gpu: $(INSTALLED)  ## Run all benchmarks of the GPU kernels, on a CUDA GPU.
	$(PIP_INSTALL) -e ".[benchmarks]"
	$(BIN)/python benchmarks/triton_report.py
	$(BIN)/python benchmarks/bench_layer_norm.py
	for constant in $(TRITON_CONSTANTS); do \
		$(BIN)/python benchmarks/bench_triton_configs.py --vary $$constant || exit 1; \
	done
	for dtype in float32 bfloat16; do \
		$(BIN)/python benchmarks/bench_operator.py --device cuda --dtype $$dtype --baselines mamba_ssm \
			--shapes $(MAPS:%=1,%) $(MAPS:%=128,%) && \
		$(BIN)/python benchmarks/profile_model.py --device cuda --dtype $$dtype || exit 1; \
	done

docs: $(INSTALLED)  ## Build the documentation into build/site, with all links checked.
	$(PIP_INSTALL) -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

digits: $(INSTALLED)  ## Retrain the bundled model of handwritten digits.
	rm -rf build/digits build/digits-run
	$(BIN)/python -m training_evmamba.digits build/digits --examples demo/examples
	$(BIN)/evmamba train --recipe digits --dataset build/digits --output-dir build/digits-run \
		--name demo/digits --license apache-2.0 \
		--about-data "$$(cat training_evmamba/recipes/digits_data.md)" \
		--about-limits "$$(cat training_evmamba/recipes/digits_limits.md)"
	rm -rf demo/digits
	cp -r build/digits-run/model demo/digits

# A pin stays while it fits: delete its line to renew it. The build of PyTorch chooses its own Triton.
LOCK := $(BIN)/uv pip compile --system-certs --quiet --no-annotate --custom-compile-command "make lock" --no-emit-package triton \
	setup.cfg --extra test

lock: $(INSTALLED)  ## Pin the versions that tests run with, after a change of setup.cfg.
	$(PIP_INSTALL) uv
	$(LOCK) --universal --python-version 3.11.7 --extra docs --extra benchmarks --output-file constraints.txt
	$(LOCK) --python-platform linux --extra timm --python-version 3.11 --resolution lowest-direct \
		--output-file constraints-lowest.txt
	$(LOCK) --python-platform linux --extra timm --python-version 3.13 --output-file constraints-newest.txt

quality: $(INSTALLED)  ## Check style, formatting, notebooks, workflows, the layers of the packages, and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/nbstripout --verify examples/*.ipynb
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/mypy

style: $(INSTALLED)  ## Fix style and formatting, and clear the outputs of notebooks.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/nbstripout examples/*.ipynb

clean:  ## Remove the files of the other targets.
	rm -rf $(VENV) $(LOWEST) $(NEWEST) .cache .hypothesis .import_linter_cache .grimp_cache .mypy_cache .pytest_cache .ruff_cache build dist \
		*.egg-info
