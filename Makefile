# make setup    install everything into .venv
# make demo     fine-tune a small diffusion policy on this machine
# make test     every check: lint, types, import contract, tests
# make lint     the checks without the tests
# make format   rewrite the code in the one format
# make clean    remove caches and builds; `make distclean` removes .venv too
#
# PYTHON=python3.12       the interpreter that .venv is made with
# TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"
#                         what to install as PyTorch. It is used only where .venv has no torch yet, so that one you
#                         installed yourself stays. Default: the tested version, without CUDA where there is no NVIDIA GPU.
# TORCH=                  leave that to pip

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)
TORCH_CPU_INDEX = https://download.pytorch.org/whl/cpu

BIN = .venv/bin
INSTALLED = .venv/installed
PIP = $(BIN)/pip --disable-pip-version-check -qq

.PHONY: setup demo test lint format clean distclean
.DELETE_ON_ERROR:

setup: $(INSTALLED)

demo: setup
	$(BIN)/dppo finetune experiment=demo run=runs/demo overwrite=true

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2

lint: setup
	$(BIN)/ruff check -q
	$(BIN)/ruff format --check -q
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

format: setup
	$(BIN)/ruff check -q --fix
	$(BIN)/ruff format

clean:
	rm -rf build dist .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "dppo needs Python 3.11 or newer, and $(PYTHON) is not: name one, e.g. make setup PYTHON=python3.12" >&2; exit 2; }
	@echo "setup: making .venv"
	@$(PYTHON) -m venv .venv

# A torch that is there already is left alone, hence constraints without it. The CPU index is asked only where there is no
# NVIDIA GPU, and passed over where it cannot be reached.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@grep -v '^torch==' constraints.txt > .venv/constraints.txt
	@if [ -n "$(TORCH)" ] && ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
		index=; \
		if ! command -v nvidia-smi >/dev/null && $(BIN)/python -c \
			'from urllib.request import urlopen; urlopen("$(TORCH_CPU_INDEX)/torch/", timeout=5)' 2>/dev/null; \
		then index="--extra-index-url $(TORCH_CPU_INDEX)"; fi; \
		echo "setup: installing $(TORCH)$${index:+ $$index} (2 GB in all, a minute or two)"; \
		$(PIP) install -c .venv/constraints.txt $$index $(TORCH); \
	fi
	@echo "setup: installing dppo and what it needs"
	@$(PIP) install -c .venv/constraints.txt -e '.[dev]'
	@touch $@
	@echo "setup: done"
