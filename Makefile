# Every target makes the environment first, if it is not there yet. `make test VENV=elsewhere` uses another one.

VENV ?= .venv
RUN = $(VENV)/bin/python -m
# One process a core, and no more than eight: each of them loads PyTorch.
PYTEST_ARGS ?= -n auto --maxprocesses 8 --dist worksteal

.PHONY: help install test lint types check reliability format

help: ## Say what there is to make
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## Make the environment, with the tools for developers
	@.ci/install $(VENV) dev

test: install ## Run the tests
	$(RUN) pytest $(PYTEST_ARGS)

lint: install
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: install
	$(RUN) mypy

check: lint types test ## Everything that a commit has to pass: ruff, mypy, the tests

reliability: install ## Measure what docs/reliability.md promises, and write its figures (a quarter of an hour on two cores)
	$(RUN) tests.reliability --out docs/reliability.md

format: install ## Put right what can be put right by itself
	$(RUN) ruff check --fix .
	$(RUN) ruff format .
