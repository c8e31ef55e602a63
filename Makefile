# `make run` trains once and leaves a row; `make test` checks everything. Both build .venv first.
PYTHON ?= python3
METHOD ?= dli
PRESET ?= quick
FOLD ?= 0
PARTITION ?= 0
SEED ?= None
FOLDS ?= []
PARTITIONS ?= []
NAME ?= $(METHOD)-$(PRESET)-p$(PARTITION)f$(FOLD)
STUDY := baselines ablation weak_supervision replication leakage attribution
BIN := .venv/bin
README ?= README.md

# The real dataset, where a copy lies beside this repository; elsewhere DLI_DATA, the cache, or a download.
ifneq ($(wildcard ../shared/magnetic-tile),)
export DLI_DATA ?= $(abspath ../shared/magnetic-tile)
endif

PAGES ?= benchmarks benchmarks_training benchmarks_parts

.PHONY: help install run figures study benchmarks test test-slow docs site-test readme prepare

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: .venv/installed ## make .venv, install the package with its dev tools, install git hooks

# dli was the name of the distribution before 0.2.0: rows would go on noting its version.
.venv/installed: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip uninstall -qq --yes dli
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@if git rev-parse --git-dir >/dev/null 2>&1; then $(BIN)/nbdev_install_hooks; fi
	@touch $@

run: install ## one training run: make run METHOD=dli (also PRESET=, FOLD=, PARTITION=, SEED=, NAME=)
	@mkdir -p runs
	$(BIN)/papermill nbs/experiments.ipynb runs/$(NAME).ipynb -p method $(METHOD) -p preset $(PRESET) \
	  -p fold $(FOLD) -p partition $(PARTITION) -p seed $(SEED) --log-output

figures: install ## re-draw paper_figures/ from the committed rows (FOLDS='[0, 1]', PARTITIONS='[0]': only these)
	@mkdir -p runs
	@failed=0; for name in $(STUDY); do \
	  $(BIN)/papermill nbs/$$name.ipynb runs/$$name.ipynb -p store paper_figures/results -y 'folds: $(FOLDS)' -y 'partitions: $(PARTITIONS)' \
	  || failed=1; done; exit $$failed

study: install ## run the study's notebooks in place, as they are committed: with outputs
	@for name in $(STUDY); do $(BIN)/jupyter nbconvert --to notebook --execute --inplace nbs/$$name.ipynb || exit 1; done
	$(BIN)/nbdev_clean

benchmarks: install ## measure anew on a quiet machine, hours: pages with outputs, tables in paper_figures/benchmarks (PAGES=)
	@mkdir -p runs
	@for name in $(PAGES); do \
	  $(BIN)/papermill nbs/$$name.ipynb runs/$$name.ipynb -p out paper_figures/benchmarks || exit 1; \
	  $(BIN)/jupyter nbconvert --to notebook --output-dir nbs --output $$name --TagRemovePreprocessor.enabled=True \
	    --TagRemovePreprocessor.remove_cell_tags injected-parameters runs/$$name.ipynb || exit 1; done
	$(BIN)/nbdev_clean

# One thread a process: two that share two cores and spin while they wait are several times slower than one.
test test-slow: export OMP_NUM_THREADS = 1

test: install ## exports and README fresh, notebooks, pytest, the site
	$(BIN)/nbdev_test --n_workers 2 --do_print
	$(BIN)/pytest -n 2 -m 'not slow'
	$(MAKE) docs

test-slow: install ## the slower checks
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[ray,loops]'
	@if $(BIN)/python -c 'import sys; from dli.data import find_magnetic_tiles; sys.exit(find_magnetic_tiles() is None)'; then skip='^[_.]'; \
	else echo "nbs/15_tiles.ipynb is left out: it looks at the real photographs, and the dataset is not here (see DLI_DATA)"; skip='^([_.]|15_tiles)'; fi; \
	$(BIN)/nbdev_test --n_workers 1 --flags slow --skip_file_re "$$skip"
	$(BIN)/pytest -m slow

prepare: install ## export the notebooks, clean them, render the README: before every commit
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(MAKE) readme

SITE := https://dli-study.github.io/dli

readme: # README.md from nbs/index.ipynb: its code marked as Python, its links those of the site, its pictures from here
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown --stdout nbs/index.ipynb \
	  | awk '/^```/ {inside = !inside; if (inside && $$0 == "```") $$0 = "```python"} {print}' \
	  | sed -e 's#](\([a-z_]*\.html\)#]($(SITE)/\1#g' -e 's#](\.\./#](#g' > $(README)

# No notebook is run for it: pages show the outputs that are committed.
docs: install ## the site, in _docs, with pip alone
	$(BIN)/python docs/build.py

site-test: docs ## the site in headless Chromium (from apt, where root may install it): pages, links, search, pictures
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[site]'
	$(BIN)/python docs/check.py _docs --shots _shots
