# Everything a fresh machine needs is set up on the way: a virtual environment in .venv, the package, its tools.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# TORCH_ARGS chooses another build of PyTorch, for example an index of CPU-only wheels.
TORCH  ?= torch==2.13.0

.PHONY: help demo test test-versions browser check check-all plugins tensorrt-headers setup clean

help:            ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(VENV)/.installed   ## Create the environment and install the package

$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(wildcard plugins/cpu/* plugins/onnxruntime/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet $(TORCH) $(TORCH_ARGS)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: setup      ## Build a compressed engine from the bundled checkpoint, generate text, compare with PyTorch
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/demo.sh build

test: setup check browser   ## Run all checks and tests
	$(BIN)/python -m pytest -n auto --dist loadfile

test-versions:   ## Run all tests with other versions of the dependencies: SET=lowest, newest or tensorrt-llm
	$(PYTHON) build_scripts/test_versions.py $(or $(SET),lowest)

browser:         ## Install Chromium for the test of the status page, where apt may do that
	@command -v chromedriver > /dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && \
		{ apt-get install -qq -y chromium chromium-driver || { apt-get update -qq && \
		apt-get install -qq -y chromium chromium-driver; }; } > /dev/null 2>&1; } || \
		echo "Chromium is not installed: the test of the status page in a browser will be skipped"

check: setup     ## Lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

plugins:         ## Build the kernel libraries: CUDA where nvcc is installed, and the host build
	@if command -v nvcc > /dev/null || [ -x "$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then \
		build_scripts/build_plugins.sh; \
	else \
		echo "nvcc is not installed: only the host library is built"; build_scripts/build_plugins.sh --host; \
	fi

tensorrt-headers:  ## Fetch TensorRT's public headers from GitHub, for build_plugins.sh --tensorrt and its tests
	build_scripts/tensorrt_headers.sh

check-all: setup check browser plugins   ## All checks and tests, the long ones too: every GPU architecture, every instantiation
	$(BIN)/python -m pytest -n auto --dist loadfile -m "long or not long"

clean:           ## Remove the environment and everything built
	rm -rf $(VENV) build
