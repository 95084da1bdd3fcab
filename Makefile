# The two commands: `make demo` and `make test`. Both set up .venv on a bare machine with Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Threads that spin while they wait for each other slow small models manifold on a machine with other work.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: setup test lint check-dependencies demo bench examples site clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	./tests/get-chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# Writes build/sbom.cdx.json; fails if the package index knows a vulnerability, and says if it could not be asked.
check-dependencies: setup
	$(BIN)/python -m tests.dependencies

demo: setup
	$(BIN)/audit demo --fail-on never

bench: setup
	$(BIN)/python -m benchmarks

# Each draws a picture into examples-out/; with QUICK=--quick in seconds.
examples: setup
	set -e; for script in $(filter-out examples/setting.py,$(wildcard examples/*.py)); do echo "$$script"; $(BIN)/python $$script $(QUICK); done

site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv site examples-out audit-demo .pytest_cache .mypy_cache .ruff_cache
