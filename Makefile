PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS) -e

.PHONY: demo notebooks studio test test-browser test-cohort test-monailabel test-oldest test-orthanc test-thorough lint clean

demo: $(VENV)/.installed-core
	$(BIN)/maisi demo

# A page in the browser; its extra is small, so it goes into the same environment.
studio: $(VENV)/.installed-studio
	$(BIN)/maisi studio

# The notebooks from top to bottom, with their outputs stored.
notebooks: $(VENV)/.installed-all
	$(BIN)/python docs/notebooks/run.py

# Workers by the cores, see tests/conftest.py, up to four; each takes whole files, whose tests share what they have
# trained, in the files' order: by the number of their tests, the longest few would come last and run alone.
SHARED := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: $(VENV)/.installed-all
	$(BIN)/python -m pytest $(SHARED)

# Everything, each property on five times as many random examples.
test-thorough: $(VENV)/.installed-all
	THOROUGH=1 $(BIN)/python -m pytest $(SHARED)

# The same with the oldest packages that may be installed, in an environment of its own; some GB of downloads.
test-oldest:
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt test

# The report and the studio in a real browser; Chromium is a system's package (Debian: apt-get install chromium).
test-browser: $(VENV)/.installed-all
	command -v chromium
	$(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS) playwright axe-playwright-python
	$(BIN)/python -m pytest -m browser

# 200 samples by one process, and by Ray with workers killed at random; 10 minutes on two cores.
test-cohort: $(VENV)/.installed-all
	$(BIN)/python -m pytest -m cohort -s

# The listener against a real PACS (Debian: apt-get install orthanc orthanc-dicomweb).
test-orthanc: $(VENV)/.installed-all
	command -v Orthanc
	$(BIN)/python -m pytest -m orthanc -s

# MONAI Label in an environment of its own: it pins numpy 1.26 and pydicom 2.
LABEL := .venv-monailabel
test-monailabel: $(VENV)/.installed-all $(LABEL)/.installed
	$(BIN)/python -m pytest -m monailabel

$(LABEL)/.installed:
	$(PYTHON) -m venv --clear $(LABEL)
	$(LABEL)/bin/python -m pip install --disable-pip-version-check monailabel==0.8.5 'pydicom<3' 'pynetdicom<3' \
		'dicomweb-client<0.60' 'monai>=1.6' pynrrd einops fire pytorch-ignite scipy
	touch $@

lint: $(VENV)/.installed-all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The stamps are older than pyproject.toml or the constraints when the environment is stale.
$(VENV)/.installed-core: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) .
	touch $@

$(VENV)/.installed-studio: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) '.[studio,dicom]'
	touch $@ $(VENV)/.installed-core

$(VENV)/.installed-all: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) '.[test,lint]'
	touch $@ $(VENV)/.installed-core $(VENV)/.installed-studio

# A link to a Python that was since removed counts as absent, so what is left of such an environment is cleared.
$(BIN)/python:
	$(PYTHON) -m venv --clear $(VENV)

clean:
	rm -rf $(VENV) .venv-oldest $(LABEL) build dist demo_output .pytest_cache .hypothesis .mypy_cache .ruff_cache tools/*.egg-info
	find bundles tests tools -type d -name __pycache__ -prune -exec rm -rf {} +
