# One command for each thing that is done here; CI runs these too. GNU make 3.81 or newer.

VENV ?= .venv
# Processes that the tests are spread over, and what else to hand to pytest: make test PYTEST="tests/theory -x"
JOBS ?= 2
PYTEST ?=
# What installs: uv where it is on the PATH, else pip, and pip alone with `make setup UV=`.
UV ?= $(shell command -v uv 2>/dev/null)

# Tests start hundreds of processes, which would each compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

STAMP := $(VENV)/.complete
RUN := $(VENV)/bin
PACKAGES := .[megatron,muon,deepspeed,hf,wandb,grpc,postgresql,docs,dev]

# A PYTHON that is asked for and is not the one the environment stands on makes it stale.
ifneq ($(PYTHON),)
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(shell PYTHON="$(PYTHON)" tools/find-python 2>/dev/null))
$(STAMP): stale
endif
endif

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-full coverage lint site dist release-check clean stale
stale:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## build .venv; PYTHON=/path/to/python3 chooses the interpreter

quickstart: $(STAMP) ## the whole path on this machine: search, transfer, a table and a picture
	$(RUN)/mup-megatron quickstart

test: $(STAMP) ## the tests
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST)

test-full: $(STAMP) ## the tests, the slow ones too
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n $(JOBS) --dist worksteal -m "slow or not slow" $(PYTEST)

coverage: $(STAMP) ## the tests, and which lines they run, those of the processes that they start too; pages in build/coverage
	mkdir -p build
	$(RUN)/coverage erase
	OMP_NUM_THREADS=1 $(RUN)/coverage run -m pytest -n $(JOBS) --dist worksteal $(PYTEST)
	$(RUN)/coverage combine --quiet
	$(RUN)/coverage html --quiet
	$(RUN)/coverage report

lint: $(STAMP) ## style and types
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

site: $(STAMP) ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build

dist: $(STAMP) ## wheel and sdist in dist/, with a look at what is in them
	$(RUN)/python tools/release-check --contents

release-check: $(STAMP) ## the same, and the wheel installed from nothing: alone, and with each extra
	$(RUN)/python tools/release-check

clean: ## remove what make and the tools built; results/ stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find mup_megatron tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp names the interpreter and is written last, so an interrupted set-up is begun again from nothing. A complete
# one is brought up to date in place. mup, the oracle of the tests, asks for torchvision, which it does not need.
# uv does not read pip's configuration, so where it does not find something pip is asked.
$(STAMP): pyproject.toml Makefile tools/find-python $(wildcard constraints/*.txt)
	@set -eu; \
	install() { \
	  if [ -n "$(UV)" ]; then \
	    if "$(UV)" pip install --python $(RUN)/python "$$@"; then return; fi; \
	    echo "uv could not install this. Going on with pip." >&2; \
	  fi; \
	  $(RUN)/python -m pip install --disable-pip-version-check "$$@"; \
	}; \
	python=$$(tools/find-python); \
	if [ "$$(cat $@ 2>/dev/null)" != "$$python" ]; then \
	  rm -rf $(VENV); \
	  if [ -n "$(UV)" ]; then "$(UV)" venv --seed --python "$$python" $(VENV); else "$$python" -m venv $(VENV); fi; \
	fi; \
	rm -f $@; \
	pins=constraints/py$$($(RUN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt; \
	if [ -f $$pins ]; then pins="-c $$pins"; \
	else echo "No $$pins: versions are not pinned with this Python." >&2; pins=; fi; \
	echo "Setting up $(VENV) with $$python. The first time this takes minutes: torch is large." >&2; \
	install $$pins -e '$(PACKAGES)'; \
	install $$pins --no-deps mup; \
	echo "$$python" > $@
