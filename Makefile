# make demo   from nothing to a distilled, evaluated student (about 8 minutes on 2 cores)
# make test   from nothing to the tests
# Both make .venv first; run again, they skip what is done. PYTHON names another interpreter, at least 3.11.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Without a GPU, a pinned torch; with one, what pip takes by itself.
CONSTRAINTS := $(shell nvidia-smi > /dev/null 2>&1 || echo -c constraints-cpu.txt)

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/llmdistill samples smollm2-135m-instruct
	$(BIN)/llmdistill run recipes/quickstart.yaml

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml constraints-cpu.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints-cpu.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e ".[test]"
	touch $@ $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "llmdistill needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) runs
