PYTHON ?= python3
BIN := .venv/bin

.PHONY: test test-unit test-slow test-browser lint demo demo-figures fuzz mini-clip test-faults test-network wheelhouse brain-mri sweep-demo

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

# Two files at a time: most of the time goes into waiting and into one thread.
test: .venv/ready
	$(BIN)/python -P -m pytest -n 2 --dist loadfile

# Room by room, without processes and networks.
test-unit: .venv/ready
	$(BIN)/python -P -m pytest -n 2 --dist loadfile tests/unit

test-slow: .venv/ready
	$(BIN)/python -P -m pytest -m slow

# The report in Chromium (/usr/bin/chromium and chromedriver, Debian's chromium and chromium-driver).
test-browser: .venv/ready
	$(BIN)/python -P -m pytest -m browser

# Every fault of docs/faults.md, with real processes; needs root for the disks that are full.
test-faults: .venv/ready
	$(BIN)/python -P -m pytest tests/integration/test_faults.py -m 'not network'

# Hosts with addresses of their own, as network namespaces; needs root, and the wheels for the air gap.
test-network: .venv/ready wheelhouse
	$(BIN)/python -P -m pytest -m network

# All that an installation without network needs: pip install --no-index --find-links wheelhouse secfacmic
wheelhouse: .venv/ready wheelhouse/ready
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir wheelhouse .

wheelhouse/ready: pyproject.toml
	$(BIN)/python -m pip wheel --quiet --wheel-dir wheelhouse .
	touch wheelhouse/ready

demo: .venv/ready
	$(BIN)/secfacmic demo

# A small sweep over epsilon, methods and seeds; go on after Ctrl-C with the same command.
sweep-demo: .venv/ready
	$(BIN)/secfacmic sweep demo --out secfacmic-sweep

# The embedded study over three seeds, with and without the domain term.
demo-figures: .venv/ready
	$(BIN)/python benchmarks/demo_figures.py

# Methods compared on brain MRI over five seeds; writes docs/results. DATA: client_0 .. client_3/CLASS/*.jpg.
brain-mri: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/brain_mri.py --data $(or $(DATA),$(error DATA is not set; expected a folder of brain MRI, client_0 .. client_3/CLASS/*.jpg: make brain-mri DATA=FOLDER))

# EXAMPLES: hostile inputs for each decoder.
fuzz: .venv/ready
	FUZZ_EXAMPLES=$(or $(EXAMPLES),20000) $(BIN)/python -P -m pytest tests/unit/protocol/test_fuzz.py

# DATA: a folder of public brain MRI, one folder a class; without it phantoms alone are used.
mini-clip: .venv/ready
	$(BIN)/python scripts/mini_clip.py --out configs/models $(if $(DATA),--data $(DATA))
