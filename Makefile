# Everything runs in .venv, which is made on first use from $(PYTHON); nothing needs activating.
PYTHON ?= python3
PYTEST_WORKERS ?= 2
DEMO_ARGS ?=

VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP)  ## Find flipped labels among handwritten digits and write runs/mislabeled_digits/report.
	$(RUN)/python examples/mislabeled_digits.py $(DEMO_ARGS)

test: lint  ## Run every gate, one after another: lint, types, doctests, tests, examples.
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n $(PYTEST_WORKERS)

lint: $(STAMP)  ## Run ruff and mypy.
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: $(STAMP)  ## Sort imports and format the code.
	$(RUN)/ruff check --select I --fix .
	$(RUN)/ruff format .

clean:  ## Remove the environment, caches and builds; runs/ stays.
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is newer than what decides the environment, or the environment is made again.
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || $(PYTHON) -m venv --without-pip $(VENV)  # some distributions leave ensurepip out
	$(RUN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m pip --python $(RUN)/python install --quiet pip
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
