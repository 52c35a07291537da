# Everything runs in .venv, which is made on first use from $(PYTHON); nothing needs activating.
PYTHON ?= python3
PYTEST_WORKERS ?= 2
DEMO_ARGS ?=

VENV := .venv
RUN := $(VENV)/bin
LIBRARY := $(VENV)/.library
STAMP := $(VENV)/.installed
RELEASE := build/release-check
ZOO := build/zoo-env
ZOO_ARGS ?=
FAULTS_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast zoo faults lint format docs release-check clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(LIBRARY)  ## Find flipped labels among handwritten digits and write runs/mislabeled_digits/report.
	$(RUN)/python examples/mislabeled_digits.py $(DEMO_ARGS)

test: lint  ## Run every gate, one after another: lint, types, doctests, tests, examples, docs, packages.
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n $(PYTEST_WORKERS) --durations=20 --record-durations build/durations.json

test-fast: $(STAMP)  ## Run the tests that take a minute together, and name the slowest twenty.
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q -n $(PYTEST_WORKERS) --durations=20 --fast

zoo: $(ZOO)/.installed  ## Check 250 models of transformers, timm and peft; ZOO_ARGS="-k Llama" for some.
	OMP_NUM_THREADS=1 ZOO_OUTCOME=build/zoo/outcome.md $(ZOO)/bin/python -m pytest -n $(PYTEST_WORKERS) \
		tests/zoo/test_oddities.py tests/zoo/whole.py tests/gradients/test_packed_weights.py $(ZOO_ARGS)
	@echo "Outcomes: build/zoo/outcome.md"

faults: $(STAMP)  ## Kill, fill, flip and race small stores 500 times; FAULTS_ARGS="--trials 50 --only kill" for some.
	OMP_NUM_THREADS=1 $(RUN)/python tests/faults/campaign.py $(FAULTS_ARGS)

lint: $(STAMP)  ## Run ruff, mypy, import-linter and codespell.
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports
	$(RUN)/codespell

format: $(STAMP)  ## Sort imports and format the code.
	$(RUN)/ruff check --select I --fix .
	$(RUN)/ruff format .

docs: $(STAMP)  ## Build the site, build/docs/index.html; a warning is an error.
	$(RUN)/python -m sphinx -W --keep-going -E -q -b html docs build/docs
	@echo "Site: build/docs/index.html"

release-check: $(STAMP)  ## Build wheel and sdist into dist, and run the wheel's demo in an empty environment.
	rm -rf dist $(RELEASE)
	$(RUN)/python -m build --outdir dist
	$(PYTHON) -m venv --without-pip $(RELEASE)/env
	$(RUN)/python -m pip --python $(RELEASE)/env/bin/python install --quiet --constraint constraints.txt dist/*.whl
	cd $(RELEASE) && env/bin/tracer --version && env/bin/tracer demo

clean:  ## Remove the environment, caches and builds; runs/ stays.
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(ZOO)/.installed: tests/zoo/requirements.txt constraints.txt setup.py
	$(PYTHON) -m venv $(ZOO) || $(PYTHON) -m venv --without-pip $(ZOO)
	$(ZOO)/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m pip --python $(ZOO)/bin/python install --quiet pip
	$(ZOO)/bin/python -m pip install --quiet --constraint constraints.txt --requirement tests/zoo/requirements.txt --editable .
	@touch $@

# A stamp is newer than what decides the environment, or the environment is made again. The demo needs the library and
# its figures only, half of what the tests need.
$(LIBRARY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || $(PYTHON) -m venv --without-pip $(VENV)  # some distributions leave ensurepip out
	$(RUN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m pip --python $(RUN)/python install --quiet pip
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[report]'
	@touch $@

$(STAMP): $(LIBRARY)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
