PYTHON ?= python3
BIN := .venv/bin

.PHONY: test lint demo mini-clip

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

demo: .venv/ready
	$(BIN)/secfacmic demo

# DATA: a folder of public brain MRI, one folder a class; without it phantoms alone are used.
mini-clip: .venv/ready
	$(BIN)/python scripts/mini_clip.py --out configs/models $(if $(DATA),--data $(DATA))
