# Two commands: `make tour` (set up, run all five methods, one report) and `make test`.
# PYTHON=python3.12 picks the interpreter, VENV=dir the environment, SCALE=tiny|small|paper the size.

SHELL := bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv
SCALE ?= small
WORKERS ?= 2
BIN := $(VENV)/bin
QUIET := HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: tour test test-slow test-extras check bench replicate drill clean help
.DELETE_ON_ERROR:

help:
	@echo "make tour         set up $(VENV) and run all five methods; ends with runs/tour/report.html"
	@echo "make test         set up $(VENV) and run the default tests"
	@echo "make check        format, lint, types, architecture"
	@echo "make test-slow    the tests marked slow        make drill      the whole fault drill"
	@echo "make test-extras  the optional engines         make bench      performance ratios"
	@echo "make replicate    the papers' experiments at SCALE=tiny|small|paper"

$(VENV)/.core: pyproject.toml constraints.txt
	@echo "setting up $(VENV) with $(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; pass PYTHON=/path/to/python3.11"; exit 2; }
	@$(INSTALL) -e '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@$(INSTALL) -e '.[dev]'
	@touch $@

$(VENV)-extras/.done: pyproject.toml constraints.txt
	@echo "setting up $(VENV)-extras"
	@test -x $(VENV)-extras/bin/python || $(PYTHON) -m venv $(VENV)-extras
	@$(VENV)-extras/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -e '.[test,wandb,eval,ray,mlx]'
	@touch $@

tour: $(VENV)/.core
	@PATH="$(abspath $(BIN)):$$PATH" SCALE=$(SCALE) $(QUIET) bash replication_scripts/tour.sh

test: $(VENV)/.core
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(QUIET) $(BIN)/python -m pytest -n $(WORKERS) \
	  -m "not slow and not gpu and not network and not extras" $(ARGS)

test-slow: $(VENV)/.core
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(QUIET) $(BIN)/python -m pytest -n $(WORKERS) \
	  -m "slow and not gpu and not network and not extras" $(ARGS)

drill: $(VENV)/.core
	OMP_NUM_THREADS=1 $(QUIET) $(BIN)/python -m pytest tests/drill -m "not extras" $(ARGS)

test-extras: $(VENV)-extras/.done
	OMP_NUM_THREADS=1 $(QUIET) $(VENV)-extras/bin/python -m pytest tests/extras -m extras $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	OMP_NUM_THREADS=1 $(QUIET) $(BIN)/python -m pytest tests/test_architecture.py tests/test_repository.py

bench: $(VENV)/.core
	@for script in benchmarks/*/*.py; do \
	  [[ $$script == */gpu.py ]] && ! command -v nvidia-smi > /dev/null && continue; \
	  echo "== $$script"; $(QUIET) $(BIN)/python $$script || exit 1; done

replicate: $(VENV)/.core
	@for script in replication_scripts/*/*.sh; do echo "== $$script"; \
	  PATH="$(abspath $(BIN)):$$PATH" SCALE=$(SCALE) $(QUIET) bash $$script || exit 1; done

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
