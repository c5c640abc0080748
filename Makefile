# Each target makes its own virtual environment when there is none; nothing has to be installed before.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Debian packages that tests look at results with.
SYSTEM_PACKAGES := chromium libimage-exiftool-perl

.PHONY: demo test system-packages lint format docs chaos bench clean

demo: $(VENV)/.user
	$(BIN)/sdbatch run jobs/demo.yaml
	$(BIN)/sdbatch verify out/demo
	$(BIN)/sdbatch report out/demo

test: $(VENV)/.developer system-packages
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder

system-packages:
	@sh tests/system-packages.sh $(SYSTEM_PACKAGES)

lint: $(VENV)/.developer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.developer
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.developer
	$(BIN)/python docs/_site/reference.py
	$(BIN)/properdocs build --strict

chaos: $(VENV)/.developer
	$(BIN)/python -m tests.chaos

bench: $(VENV)/.developer
	$(BIN)/python -m tests.benchmarks.pipeline

clean:
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.user: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable .
	touch $@

$(VENV)/.developer: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[dev]'
	touch $@ $(VENV)/.user
