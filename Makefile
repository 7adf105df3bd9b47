# Two commands on a fresh machine do everything: `make demo` and `make test`.
# TORCH_INDEX=URL names an index with CPU-only torch wheels (several GB less to download).

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
INDEX  := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
MINIMUM_FREE_GB := 8

.PHONY: demo test check lint types tests install stubs constraints clean

demo: install
	$(BIN)/python -m benchmarks.demo

test: lint types tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

tests: install
	$(BIN)/python -m pytest -n auto --dist loadgroup

install: $(VENV)/.installed

# One stamp: nothing is installed again until the dependencies change.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory check
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(INDEX) -c constraints.txt -e '.[dev]'
	@touch $@

check:
	@command -v $(PYTHON) >/dev/null || { echo "expected Python 3.11 or newer as $(PYTHON), found none; install it or give PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "expected Python 3.11 or newer, found $$($(PYTHON) -V 2>&1) as $(PYTHON); give PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "expected the venv module of $(PYTHON), found none; install it (Debian: apt-get install python3-venv)" >&2; exit 2; }
	@test -d $(VENV) || $(PYTHON) -c 'import shutil, sys; free = shutil.disk_usage(".").free / 1e9; sys.exit(0 if free >= $(MINIMUM_FREE_GB) else f"expected $(MINIMUM_FREE_GB) GB of free disk for torch and its libraries, found {free:.1f} GB; make room, or give TORCH_INDEX= with CPU wheels")'

# The versions that were tested; pyproject.toml keeps the ranges.
constraints: install
	$(BIN)/python -m pip freeze --exclude-editable > constraints.txt

stubs: install
	$(BIN)/python -m protos.generate

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
