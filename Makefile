# Two commands, in either order, on a machine with nothing but Python 3.11 or 3.12, make and git:
#   make demo    set up, then run the main job on the embedded cells
#   make test    set up, then check and test
# Each makes .venv itself and needs no activation. A set-up is repeated only when pyproject.toml or
# the lock file has changed. Another interpreter: make demo PYTHON=/path/to/python3.12.
# Job options: make demo ARGS="--run.dir runs/again --train.seed 1".

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
LOCK := docker/constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $$p && break; done)

.PHONY: demo test test-slow test-soak lint lock clean

demo: $(VENV)/.demo
	$(BIN)/python jobs/pretrain.py $(ARGS)

test: lint
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow and not soak" $(ARGS)

test-soak: $(VENV)/.dev
	$(BIN)/python -m pytest -m soak $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.python:
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' || { \
		echo "error: langcell needs Python 3.11 or 3.12; '$(or $(PYTHON),python3)' is not one." >&2; \
		echo "       Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: $(VENV)/.python pyproject.toml $(LOCK)
	@echo "installing langcell[$*] into $(VENV), once (a few minutes)"
	$(PIP) -c $(LOCK) -e '.[$*]'
	@touch $@

# Newest versions that pyproject.toml admits, installed afresh and written down. The torch pin is kept
# by hand and without a build's local part (+cpu, +cu130), so that every build of it satisfies it.
lock: $(VENV)/.python
	d=$$(mktemp -d) && grep '^torch==' $(LOCK) > $$d/torch.txt && $(PYTHON) -m venv $$d/venv \
	&& $$d/venv/bin/python -m pip install --quiet -c $$d/torch.txt -e '.[dev]' \
	&& grep '^#' $(LOCK) > $$d/lock.txt && $$d/venv/bin/python -m pip freeze --all \
		--exclude langcell --exclude pip --exclude wheel | sed 's/^\(torch==[0-9.]*\).*/\1/' >> $$d/lock.txt \
	&& cp $$d/lock.txt $(LOCK) && rm -r $$d

# Runs and corpora (runs/) are never removed.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
