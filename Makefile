# Each target makes .venv and installs what it needs, once. Only Python >= 3.10, make and a network are assumed.
# `make PYTHON=python3.12 test` picks another interpreter (after `make distclean`, if .venv exists already);
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf) are respected.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# More arguments for the command behind a target: `make test ARGS='-k compression'`.
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-all lint docs bench clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

quickstart: $(VENV)/.installed-core ## train a small Llama on real text over two processes with ACP-SGD
	$(BIN)/lightning-efficient fit -c quickstart.yaml $(ARGS)
	@echo
	@echo "That was a Llama on two processes that exchanged compressed gradients. What to try next:"
	@echo "  . $(BIN)/activate                                                   use the commands below as they are"
	@echo "  lightning-efficient recipes list                                        see the other recipes"
	@echo "  lightning-efficient recipes copy quickstart.yaml my.yaml                write this one to a file of yours, to edit"
	@echo "  lightning-efficient fit -c quickstart.yaml --trainer.strategy top_k     the same with another compressor"
	@echo "  lightning-efficient compression recommend -c quickstart.yaml            is compression worth it on this link?"
	@echo "  lightning-efficient dissect -c quickstart.yaml                          where do the time and memory of a step go?"
	@echo "  lightning-efficient fit -c moe/parm                                     a mixture of experts over four processes"
	@echo "  lightning-efficient doctor                                              what this machine has, and what it lacks"
	@echo "  docs/tutorials/first_recipe.md                                          your first recipe, step by step"

test: $(VENV)/.installed-test ## run the tests
	$(BIN)/python -m pytest -m "not exhaustive" $(ARGS)

test-all: $(VENV)/.installed-test ## run the tests, and the whole of each grid of which `test` runs a sample
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-test ## style, types, layers and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

docs: $(VENV)/.installed-docs ## build the documentation into docs/_build/html
	$(BIN)/python -m sphinx -n -W --keep-going -b html docs docs/_build/html $(ARGS)

bench: $(VENV)/.installed-bench ## measure the compressors over slow links (Linux, root, iproute2)
	$(BIN)/python -m tests.benchmarks.compression_links $(ARGS)

clean: ## remove what was built and cached; .venv and your runs stay
	rm -rf build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find lightning_efficient tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)

# The stamp, not the folder, says that .venv is whole: an interrupted `python -m venv` leaves a folder behind.
$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "error: no '$(PYTHON)' on this machine: Python 3.10 or newer is needed. Install it, or name one with 'make PYTHON=/path/to/python3'." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: '$(PYTHON)' is $$($(PYTHON) --version 2>&1): Python 3.10 or newer is needed. Name one with 'make PYTHON=/path/to/python3'." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' has no venv module (Debian and Ubuntu package it apart): .venv cannot be made. Run 'apt-get install python3-venv'." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# One stamp for each set of extras; `core` is the package alone.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/.created
	$(BIN)/python -m pip install -c constraints.txt -e '.$(if $(filter core,$*),,[$*])'
	@touch $@
