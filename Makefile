# SPDX-License-Identifier: Apache-2.0
#
#   make demo       build, and relay real traffic between networks that it makes for the purpose
#   make test       build, and run all tests
#   make bench      build, and measure beside other relays (MODE=full: longer; ARGUMENTS='--only latency')
#   make setup      install what is needed, build into .venv
#   make lint       only the style and type checks
#   make fuzz       build the fuzz targets and run them, for SECONDS=600 in all (EXECUTIONS=...: at most so many)
#   make soak       build, and have traffic, random changes and deaths of processes for SECONDS=1800
#   make wheel      build the wheel and the source distribution into build/dist
#   make deb        build the Debian package into build/dist
#   make packages-test   build both, and try them on every Python of this machine
#   make clean      remove what was built
#
# Everything lands in .venv and build/ here; what the distribution has to provide is installed with apt (as root, or
# with sudo), and only what is missing. PYTHON=... chooses an interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DIST := build/dist
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)
export PYTHON
export PIP_DISABLE_PIP_VERSION_CHECK = 1

SOURCES := $(shell find src native -type f \( -name '*.py' -o -name '*.pyx' -o -name '*.pyi' -o -name '*.[ch]' \)) \
    $(wildcard man/*) meson.build meson_options.txt pyproject.toml README.md LICENSE

.PHONY: demo test bench setup lint fuzz soak wheel deb packages-test clean

demo: $(VENV)/.installed
	@packaging/install-requirements demo
	$(SUDO) $(BIN)/python -m lab.demo

# Tests that some processes share the machine for, the longest first; the others put load on it, and have it for
# themselves.
SHARING := tests/native tests/engines tests/integration tests/packaging tests/unit \
    $(foreach name,async_client bad_input change client_docs config events explain hostile_clients hostile_packets \
    interfaces json legs lifecycle logs loops memberships metrics patterns peers privileges programs restore rootless \
    sandbox store tap top transactions upgrade_orders upgrade_refused,tests/e2e/test_$(name).py)

test: $(VENV)/.develop $(VENV)/.installed $(DIST)/.deb
	@packaging/install-requirements test
	$(SUDO) $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(SHARING)
	$(SUDO) $(BIN)/python -m pytest tests $(SHARING:%=--ignore=%)

MODE := quick
ARGUMENTS :=

bench: $(VENV)/.bench $(VENV)/.installed
	@packaging/install-requirements bench
	@mkdir -p build
	$(SUDO) $(BIN)/python -m bench --mode $(MODE) --json build/bench.json --markdown build/bench.md \
	    --chart build/bench.svg $(ARGUMENTS)

lint: $(VENV)/.develop $(VENV)/.installed
	$(BIN)/python -m pytest tests/unit/test_style.py

fuzz: SECONDS := 600
fuzz: $(VENV)/.develop $(VENV)/.installed
	@packaging/install-requirements fuzz
	$(PYTHON) tests/native/fuzz.py $(SECONDS) $(EXECUTIONS)
	$(BIN)/python tests/unit/test_damaged_frames.py $$(($(SECONDS) / 10))

SEED := $(shell date +%s)

soak: SECONDS := 1800
soak: $(VENV)/.develop $(VENV)/.installed
	@packaging/install-requirements test
	$(SUDO) env MCRELAY_TRANSACTIONS=1000 MCRELAY_SEED=$(SEED) $(BIN)/python -m pytest tests/e2e/test_transactions.py
	$(SUDO) $(BIN)/python -m lab.soak $(SECONDS) $(ARGUMENTS)

setup: $(VENV)/.develop $(VENV)/.installed
	@packaging/install-requirements test

# meson and ninja are found on PATH.
$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install -q --no-build-isolation --no-deps --force-reinstall \
	    --config-settings=build-dir=build/wheel .
	@touch $@

$(VENV)/.tools: pyproject.toml packaging/install-requirements packaging/dependencies
	@packaging/install-requirements build
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $$($(BIN)/python packaging/dependencies build run)
	@touch $@

$(VENV)/.develop: $(VENV)/.tools
	$(BIN)/pip install -q $$($(BIN)/python packaging/dependencies develop)
	@touch $@

$(VENV)/.bench: $(VENV)/.tools
	$(BIN)/pip install -q $$($(BIN)/python packaging/dependencies bench)
	@touch $@

$(VENV)/.package: $(VENV)/.tools
	$(BIN)/pip install -q $$($(BIN)/python packaging/dependencies package)
	@touch $@

# For every Python from the one that builds it on (the stable interface), so build it with the oldest: PYTHON=python3.11
wheel: $(DIST)/.wheel $(DIST)/.sdist
deb: $(DIST)/.deb

# What it is called says which C library it does with, at least: what pip makes is for this machine alone.
$(DIST)/.wheel: $(VENV)/.package $(SOURCES)
	@mkdir -p $(DIST)
	rm -f $(DIST)/*.whl build/unnamed/*.whl
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip wheel -q --no-build-isolation --no-deps \
	    --config-settings=build-dir=build/wheel --wheel-dir build/unnamed .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir $(DIST) build/unnamed/*.whl 2>build/auditwheel.log || \
	    { cat build/auditwheel.log >&2; exit 1; }
	@touch $@

# Of what is committed.
$(DIST)/.sdist: $(VENV)/.tools $(SOURCES)
	@mkdir -p $(DIST)
	rm -f $(DIST)/*.tar.gz
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -c 'import mesonpy; mesonpy.build_sdist("$(DIST)")' >build/sdist.log
	@touch $@

$(DIST)/.deb: $(DIST)/.wheel $(VENV)/.installed $(shell find packaging docs -type f) CHANGELOG.md
	@packaging/install-requirements package
	rm -f $(DIST)/*.deb
	packaging/completions $(BIN)/mcrelay build/completions
	PYTHON=$(BIN)/python packaging/build-deb $(DIST)/mcrelay-*.whl build/completions $(DIST)
	@touch $@

packages-test: $(VENV)/.develop $(VENV)/.installed $(DIST)/.deb
	@packaging/install-requirements test
	$(SUDO) env MCRELAY_PACKAGES=all $(BIN)/python -m pytest tests/packaging tests/packaging/sdist.py

clean:
	rm -rf $(VENV) build
