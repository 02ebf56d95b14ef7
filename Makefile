PYTHON ?= python3
BIN := .venv/bin

.PHONY: test test-slow lint demo demo-figures fuzz mini-clip

# The environment is made anew when pyproject.toml changes.
.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch .venv/ready

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: .venv/ready
	$(BIN)/python -m pytest

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

demo: .venv/ready
	$(BIN)/secfacmic demo

# The embedded study over three seeds, with and without the domain term.
demo-figures: .venv/ready
	$(BIN)/python benchmarks/demo_figures.py

# EXAMPLES: hostile inputs for each decoder.
fuzz: .venv/ready
	FUZZ_EXAMPLES=$(or $(EXAMPLES),20000) $(BIN)/python -m pytest tests/test_fuzz.py

# DATA: a folder of public brain MRI, one folder a class; without it phantoms alone are used.
mini-clip: .venv/ready
	$(BIN)/python scripts/mini_clip.py --out configs/models $(if $(DATA),--data $(DATA))
