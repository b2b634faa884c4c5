PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e

.PHONY: demo test test-browser lint clean

demo: $(VENV)/.installed-core
	$(BIN)/maisi demo

test: $(VENV)/.installed-all
	$(BIN)/python -m pytest

# The report in a real browser; Chromium is a system's package (Debian: apt-get install chromium).
test-browser: $(VENV)/.installed-all
	command -v chromium
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt playwright
	$(BIN)/python -m pytest -m browser

lint: $(VENV)/.installed-all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The stamps are older than pyproject.toml or constraints.txt when the environment is stale.
$(VENV)/.installed-core: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) .
	touch $@

$(VENV)/.installed-all: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[test,lint]'
	touch $@ $(VENV)/.installed-core

# A link to a Python that was since removed counts as absent, so what is left of such an environment is cleared.
$(BIN)/python:
	$(PYTHON) -m venv --clear $(VENV)

clean:
	rm -rf $(VENV) build dist demo_output .pytest_cache .hypothesis .mypy_cache .ruff_cache tools/*.egg-info
	find bundles tests tools -type d -name __pycache__ -prune -exec rm -rf {} +
