PYTHON ?= $(shell command -v python3.11 || command -v python3)
CHOSEN := $(if $(filter file,$(origin PYTHON)),,--this-python)
BIN := .venv/bin

.PHONY: environment test test-unit test-slow test-browser lint docs coverage audit lock demo demo-figures fuzz mini-clip
.PHONY: test-pacs test-faults test-network wheelhouse brain-mri sweep-demo

# Makes .venv anew when pyproject.toml or requirements-dev.txt changes, when it runs another checkout's code, or when
# PYTHON names another version than it has; which PYTHON chose stays until it chooses another.
# TORCH_INDEX: where to take torch and torchvision from, for a machine without a graphics card.
export TORCH_INDEX
environment:
	@$(PYTHON) scripts/environment.py $(CHOSEN)

lint: environment
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Tests write durably, which takes disks longer than all else: in memory, if 4 GiB of it are to be had.
MEMORY := $(shell [ "$$(df --output=avail /dev/shm 2>/dev/null | tail -n 1)" -gt 4194304 ] 2>/dev/null \
	&& ! grep -q ' /dev/shm .*noexec' /proc/mounts && echo /dev/shm)
test test-unit: export TMPDIR := $(or $(TMPDIR),$(MEMORY),/tmp)

# Two files at a time, the small ones of the rooms last, so that none is left over for one process: most of the time goes
# into waiting and into one thread.
SHARED := -n 2 --dist loadfile --no-loadscope-reorder
test: environment
	$(BIN)/python -P -m pytest $(SHARED)

# Room by room, without processes and networks.
test-unit: environment
	$(BIN)/python -P -m pytest $(SHARED) tests/unit

# The site, with a reference made of the models and the command line, into build/docs; a warning is an error.
docs: environment
	$(BIN)/mkdocs build --strict

# Of statements and branches, in other processes too. TESTS: fewer tests, as in TESTS=tests/unit.
coverage: environment
	$(BIN)/python -P -m pytest $(SHARED) --cov --cov-report=term:skip-covered $(TESTS)

# Known vulnerabilities in what requirements-dev.txt pins; what cannot be looked up is a failure.
audit: environment
	$(BIN)/python scripts/audit.py

# What environment installs, anew after a change of pyproject.toml. Versions stay unless LOCK=--upgrade or
# LOCK='--upgrade-package NAME' says otherwise. On Linux x86_64 with Python 3.11 only.
lock: $(BIN)/pip-compile
	$(BIN)/pip-compile --quiet --no-header --extra dev --extra docs --build-deps-for editable --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --allow-unsafe --strip-extras $(LOCK) \
		--output-file requirements-dev.txt pyproject.toml
	sed --in-place requirements-dev.txt \
		-e '1i # What make installs for development: for CPython 3.11 on Linux x86_64. Elsewhere make goes without it and' \
		-e '1i # takes the newest versions that fit. Made by make lock; do not edit.'

$(BIN)/pip-compile:
	@$(PYTHON) scripts/environment.py $(CHOSEN)

# Some need root, since full disks are mounted.
test-slow: environment
	$(BIN)/python -P -m pytest -m slow

# The report in Chromium (/usr/bin/chromium and chromedriver, Debian's chromium and chromium-driver).
test-browser: environment
	$(BIN)/python -P -m pytest -m browser

# Fetching from a real archive: Orthanc on loopback (Debian's orthanc and orthanc-dicomweb).
test-pacs: environment
	$(BIN)/python -P -m pytest tests/integration/test_pacs.py -m pacs

# Every fault of docs/faults.md, with real processes; needs root for the disks that are full.
test-faults: environment
	$(BIN)/python -P -m pytest tests/integration/test_faults.py -m 'not network'

# Hosts with addresses of their own, as network namespaces; needs root, and the wheels for the air gap.
test-network: environment wheelhouse
	$(BIN)/python -P -m pytest -m network

# All that an installation without network needs: pip install --no-index --find-links wheelhouse secfacmic
wheelhouse: environment wheelhouse/ready
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir wheelhouse .

wheelhouse/ready: pyproject.toml
	$(BIN)/python -m pip wheel --quiet --wheel-dir wheelhouse .
	touch wheelhouse/ready

demo: environment
	$(BIN)/secfacmic demo

# A small sweep over epsilon, methods and seeds; go on after Ctrl-C with the same command.
sweep-demo: environment
	$(BIN)/secfacmic sweep demo --out secfacmic-sweep

# The embedded study over three seeds, with and without the domain term.
demo-figures: environment
	$(BIN)/python benchmarks/demo_figures.py

# Methods compared on brain MRI over five seeds; writes docs/results. DATA: client_0 .. client_3/CLASS/*.jpg.
brain-mri: environment
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/brain_mri.py --data $(or $(DATA),$(error DATA is not set; expected a folder of brain MRI, client_0 .. client_3/CLASS/*.jpg: make brain-mri DATA=FOLDER))

# EXAMPLES: hostile inputs for each decoder and reader.
fuzz: environment
	FUZZ_EXAMPLES=$(or $(EXAMPLES),20000) $(BIN)/python -P -m pytest tests/unit/protocol/test_fuzz.py tests/unit/clients/test_reading_fuzz.py tests/unit/model/test_backbone_fuzz.py

# DATA: a folder of public brain MRI, one folder a class; without it phantoms alone are used.
mini-clip: environment
	$(BIN)/python scripts/mini_clip.py --out configs/models $(if $(DATA),--data $(DATA))
	$(BIN)/python scripts/mini_clip.py --out configs/models --statistics $(if $(DATA),--data $(DATA))
