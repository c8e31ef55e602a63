# `make run` trains once and leaves a row; `make test` checks everything. Both build .venv first.
PYTHON ?= python3
METHOD ?= dli
PRESET ?= quick
SEED ?= 0
NAME ?= $(METHOD)-$(PRESET)-$(SEED)
BIN := .venv/bin

# The real dataset, where a copy lies beside this repository; elsewhere DLI_DATA, the cache, or a download.
ifneq ($(wildcard ../shared/magnetic-tile),)
export DLI_DATA ?= $(abspath ../shared/magnetic-tile)
endif

.PHONY: help install run test test-slow docs readme prepare

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: .venv/installed ## make .venv, install the package with its dev tools, install git hooks

.venv/installed: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@if git rev-parse --git-dir >/dev/null 2>&1; then $(BIN)/nbdev_install_hooks; fi
	@touch $@

run: install ## one training run: make run METHOD=dli (also PRESET=, SEED=, NAME=)
	@mkdir -p runs
	$(BIN)/papermill nbs/experiments.ipynb runs/$(NAME).ipynb -p method $(METHOD) -p preset $(PRESET) -p seed $(SEED) --log-output

test: install ## exports and README fresh, notebooks, pytest
	$(BIN)/nbdev_test --n_workers 2 --do_print
	$(BIN)/pytest -m 'not slow'

test-slow: install ## the slower checks
	$(BIN)/nbdev_test --n_workers 1 --flags slow
	$(BIN)/pytest -m slow

prepare: install ## export the notebooks, clean them, render the README: before every commit
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(MAKE) readme

readme: install
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown --output-dir . --output README nbs/index.ipynb

docs: install ## the site, in _docs (Quarto users: nbdev_docs builds it from the same files)
	$(BIN)/nbdev_proc_nbs
	$(BIN)/smalldocs render --strict _proc
