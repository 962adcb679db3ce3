# `make demo` and `make test` need nothing but Python 3.10 or newer; both set up .venv first.
PYTHON ?= python3
VENV := .venv/bin
DEMO_OUTPUT ?= output/demo

.PHONY: help demo test soak lint coverage mutants gpu-check checkpoint tables clean

help:
	@echo "make help        list what make can do here"
	@echo "make demo        prune the demo detector from end to end; results in $(DEMO_OUTPUT)"
	@echo "make test        run the tests"
	@echo "make soak        kill runs 100 times and more, fuzz for longer, 1,000 steps each (about half an hour)"
	@echo "make lint        check format, style and types"
	@echo "make coverage    run the tests and tell which lines of pruning/ and util/ they do not reach"
	@echo "make mutants     do small wrongs to a copy of the program and see that tests notice (10 minutes)"
	@echo "make gpu-check   run all that needs a GPU"
	@echo "make checkpoint  train checkpoints/demo.pth anew (about 70 minutes on two CPU cores)"
	@echo "make tables      make the README's tables anew of the figures in bench/results"
	@echo "make clean       remove .venv and output"

# The stamps make pip run once for each change of the lists, not at every call.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	$(VENV)/pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

demo: .venv/installed
	$(VENV)/python -m bench.demo --output $(DEMO_OUTPUT)

test: .venv/installed-tests
	$(VENV)/python -m pytest

soak: .venv/installed-tests
	SOAK=1 $(VENV)/python -m pytest -m "soak or not soak" tests/trust

lint: .venv/installed-tests
	$(VENV)/ruff format --check .
	$(VENV)/ruff check .
	$(VENV)/mypy

coverage: .venv/installed-tests
	$(VENV)/python -m pytest --cov --cov-report=term-missing:skip-covered

mutants: .venv/installed-tests
	$(VENV)/python -m tests.trust.mutants

gpu-check: .venv/installed-tests
	$(VENV)/python -m pytest -m gpu

checkpoint: .venv/installed
	PATH="$(CURDIR)/$(VENV):$$PATH" sh checkpoints/train_demo.sh

tables: .venv/installed
	$(VENV)/python -m bench.tables

clean:
	rm -rf .venv output
