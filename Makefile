# Everything starts from Python 3.11 or newer and make; the environment is made on first use.
SHELL   := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON  ?= $(shell command -v python3.11 || command -v python3)
BIN     := .venv/bin
READY   := .venv/.installed
DOCS    := .venv/.docs
DATASET ?= digits
WHAT    ?= fisher convolutions training precision overhead methods
PROFILE ?= $(if $(filter digits,$(DATASET)),quick,cpu)
# The digits of a result depend on the instructions that it is summed with; what is to come out again asks for those that newer processors have, too.
PORTABLE := $(shell grep -qw avx2 /proc/cpuinfo 2>/dev/null && echo ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2)
NOTEBOOKS = nbs/*.ipynb nbs/*/*.ipynb
# Tests start hundreds of processes; each would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help reproduce test test-slow test-lowest coverage bench docs sync notebooks lint readme

help:
	@echo "make reproduce [DATASET=mnist] [PROFILE=cpu]  train, retrain and forget a class, on digits in two minutes"
	@echo "make test                                     notebooks, tests, sync, lint and types"
	@echo "make test-slow                                the tests that take longer"
	@echo "make test-lowest                              quick tests with the lowest versions that pyproject.toml allows"
	@echo "make coverage [TESTS='tests/test_grid.py']    lines and branches of the package that tests reach"
	@echo "make bench [WHAT=fisher] [BENCH='--repeats 9'] what scoring, training and a run's bookkeeping cost; an hour on two cores"
	@echo "make docs                                     all chapters and results as a book: _docs/html/index.html"
	@echo "make readme                                   README.md from nbs/index.ipynb"

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev,ray]'
	@touch $@

# What makes the book is installed only where the book, or its tests, are asked for.
$(DOCS): $(READY)
	$(BIN)/pip install --quiet --editable '.[docs]'
	@touch $@

reproduce: $(READY)
	$(PORTABLE) $(BIN)/fisher-unlearn quickstart --profile $(PROFILE) --dataset $(DATASET)

# Two processes of one thread do more on two cores than one of two threads; threads that runs ask for must not spin while they wait.
test: sync
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint notebooks
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -q -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY) $(DOCS)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -q -m slow --numprocesses 2 --dist loadfile --no-loadscope-reorder

# An environment over the first one: torch is there already, and what has a lower bound is found before its newest version.
LOWEST := .lowest
QUICK  := $(addprefix tests/test_,$(addsuffix .py,requirements arguments data fused metrics models noise report schedule)) \
          tests/lowest_installed.py tests/test_notebooks.py::test_quickstart_leaves_table_figure_records_and_a_clean_notebook
$(LOWEST)/.installed: $(READY) tests/lowest.py
	rm -rf $(LOWEST) && $(BIN)/python -m venv $(LOWEST)
	$(BIN)/python tests/lowest.py > $(LOWEST)/requirements.txt
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > "$$($(LOWEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/newest.pth"
	$(LOWEST)/bin/pip install --quiet --only-binary :all: --requirement $(LOWEST)/requirements.txt
	@touch $@

test-lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -q -m "not slow" --disable-warnings $(QUICK)

TESTS ?= tests
coverage: $(READY)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -q -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder --cov --cov-report term-missing:skip-covered $(TESTS)

bench: $(READY)
	for what in $(WHAT); do $(BIN)/python benchmarks/$$what.py $(BENCH) || exit 1; done

docs: $(DOCS)
	$(BIN)/python docs/build.py _docs
	@echo "The book is _docs/html/index.html."

# Cleaning, exporting and rendering again must change nothing, and executed copies must be of today's notebooks.
sync: $(READY)
	@sums() { cat $(NOTEBOOKS) fisher_unlearn/*.py fisher_unlearn/*/*.py README.md | sha256sum; }; before=$$(sums); \
	$(BIN)/nbdev_clean && $(BIN)/nbdev_export && $(MAKE) --no-print-directory readme && \
	if [ "$$before" != "$$(sums)" ]; then echo "Notebooks, package and README.md were out of step; they are not any more: commit them."; git status --short; exit 1; fi
	@$(BIN)/python tests/copies.py
	@echo "Notebooks, package and README.md agree."

# nbdev_test passes if it finds nothing to test, so what was tested is counted. Two notebooks share the cores, so their threads must not spin while they wait.
# The experiments are executed by pytest, which looks at what they leave; tests/test_notebooks.py says by which file.
notebooks: $(READY)
	@export FISHER_UNLEARN_RUNS=$$(mktemp -d) FISHER_UNLEARN_FIGURES=$$(mktemp -d) OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive; \
	trap 'rm -rf "$$FISHER_UNLEARN_RUNS" "$$FISHER_UNLEARN_FIGURES"' EXIT; \
	timeout 20m $(BIN)/nbdev_test --skip_folder_re '^([_.]|experiments$$)' --n_workers 2 --do_print > .notebooks.log 2>&1; status=$$?; cat .notebooks.log; \
	[ $$status -eq 0 ] || exit 1; found=$$(ls nbs/*.ipynb nbs/[0-9]*/*.ipynb | wc -l); tested=$$(grep -c '^- Completed' .notebooks.log); \
	echo "$$tested of $$found notebooks tested"; [ $$tested -eq $$found ]

lint: $(READY)
	$(BIN)/ruff check fisher_unlearn nbs tests benchmarks docs
	$(BIN)/ruff format --quiet --check nbs tests benchmarks docs || { echo "Run .venv/bin/ruff format nbs tests benchmarks docs."; exit 1; }
	$(BIN)/mypy fisher_unlearn

readme: $(READY)
	@$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --stdout nbs/index.ipynb \
	    --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags=hide_input \
	  | sed 's#](\([0-9a-z_/]*\.ipynb\))#](nbs/\1)#g; s#](\.\./#](#g; s#^    *$$##' | cat -s | awk '/^```/ {open = !open; if (open && $$0 == "```") $$0 = "```python"} 1' \
	  > README.md.part && [ -s README.md.part ] && mv README.md.part README.md
