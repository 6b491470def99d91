# robustcv: `make demo` shows it, `make test` checks it, `make lab` opens the notebooks.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SCALE ?= demo
DATA ?=
OUT ?= demo

.PHONY: demo test test-long lab bench check export readme notebooks clean help
.DELETE_ON_ERROR:

help:
	@echo "make demo   every section in short, and a report  SCALE=$(SCALE) DATA=folder OUT=$(OUT)"
	@echo "make test   notebooks, tests, and what must be current"
	@echo "make test-long   kills, fuzzing and crowds, which take minutes"
	@echo "make lab    JupyterLab on nbs/"
	@echo "make bench  speed beside peers                   DATA=folder"
	@echo "for whoever changes notebooks: make export readme notebooks"

# An installation that was interrupted leaves .installing behind and is started over.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "robustcv needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@if [ -e $(1)/.installing ] || ! $(1)/bin/python -m pip --version >/dev/null 2>&1; then rm -rf $(1) && $(PYTHON) -m venv $(1); fi
	@touch $(1)/.installing
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$(2)]'
	@rm $(1)/.installing && touch $@
endef

$(VENV)/.installed-dev: settings.ini setup.py pyproject.toml
	$(call install,$(VENV),dev)

$(VENV)-bench/.installed: settings.ini setup.py pyproject.toml
	$(call install,$(VENV)-bench,bench)

demo: $(VENV)/.installed-dev # the report is an executed notebook
	$(BIN)/robustcv demo --scale $(SCALE) --out "$(OUT)" $(if $(DATA),--data "$(DATA)")

test: check
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=5

test-long: $(VENV)/.installed-dev # kills, fuzzing and crowds: minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=10 tests/long

# exported modules, cleaned notebooks and README must be what the notebooks say
check: $(VENV)/.installed-dev
	$(BIN)/ruff check robustcv tests scripts setup.py
	$(BIN)/ruff check --select F821,E501 nbs/*.ipynb # a name that a notebook never defines, a line that is too long
	$(BIN)/python scripts/check_current.py

lab: $(VENV)/.installed-dev
	$(BIN)/jupyter lab --notebook-dir=. nbs/index.ipynb

bench: $(VENV)-bench/.installed # peers, some of which pin old packages, live in an environment of their own
	$(VENV)-bench/bin/robustcv bench $(if $(DATA),--data "$(DATA)")

export: $(VENV)/.installed-dev
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export

readme: $(VENV)/.installed-dev
	$(BIN)/python scripts/readme.py

# run every notebook and keep its outputs; cells marked `#| gpu` only with GPU=1
notebooks: export
	$(BIN)/python scripts/execute.py $(if $(GPU),--gpu) nbs/*.ipynb
	$(BIN)/nbdev_clean
	$(BIN)/python scripts/readme.py

clean:
	rm -rf demo runs build *.egg-info
