# `make demo` and `make test` only need Python 3.10 or newer; they create .venv first.
PYTHON ?= python3
VENV := .venv/bin
DEMO_OUTPUT ?= output/demo

.PHONY: help demo test soak lint coverage mutants gpu-check checkpoint tables clean

help:
	@echo "make help        list the targets"
	@echo "make demo        prune the demo detector from start to end; writes to $(DEMO_OUTPUT)"
	@echo "make test        run the tests"
	@echo "make soak        run the long tests: kills, fuzzing, 1,000 steps, every case (about half an hour)"
	@echo "make lint        check format, style and types"
	@echo "make coverage    run the tests and list untested lines"
	@echo "make mutants     mutation testing: inject bugs into a copy; the tests must fail (about 10 minutes)"
	@echo "make gpu-check   run the tests that need a GPU"
	@echo "make checkpoint  train checkpoints/demo.pth from scratch (about 70 minutes on two CPU cores)"
	@echo "make tables      write the figures of bench/results into README.md and docs/"
	@echo "make clean       remove .venv and output"

# With these stamp files, pip runs only after a requirements file has changed.
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
	$(VENV)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: .venv/installed-tests
	SOAK=1 $(VENV)/python -m pytest -m "soak or not soak" tests/trust
	SOAK=1 $(VENV)/python -m pytest -m soak --ignore tests/trust

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
	$(VENV)/python -m bench.pages

clean:
	rm -rf .venv output
