# Every target sets up .venv first if it is missing. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_RESULTS ?= demo-results

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check format bench report clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv with nmsweep and its tools in it

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,cluster]'
	touch $@

demo: $(READY)  ## a real sweep on SmolLM2-135M and its report
	$(BIN)/nmsweep experiment=demo results_dir=$(DEMO_RESULTS)
	$(BIN)/nmsweep report results_dir=$(DEMO_RESULTS)

test: $(READY)  ## the test suite, in two halves side by side; minutes on two cores
	@export OMP_NUM_THREADS=1; $(BIN)/python -m pytest tests/integration & integration=$$!; \
	$(BIN)/python -m pytest tests/unit tests/property tests/golden; others=$$?; \
	wait $$integration && exit $$others

test-all: $(READY)  ## the slow tests too
	$(BIN)/python -m pytest -m 'not gpu and not slurm'

check: $(READY)  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## speed of the kernel and of a forward pass here, sparse against dense
	$(BIN)/nmsweep bench

report: $(READY)  ## tables and plots of results/
	$(BIN)/nmsweep report

clean:  ## remove what was built; results stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
