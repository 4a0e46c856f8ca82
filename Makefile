# make demo   fine-tune a small model on the package's own pairs, and compare with the plain path
# make check  ruff, pyright and the core's quick tests
# make test   the test suite, on all cores, one summary at the end
# make bench  time, memory and accuracy beside the other packages: 20 minutes on a CPU; results in bench_results/,
#             and README.md's figures are drawn from them
# make lint   ruff and pyright
# make dist   wheel and source distribution in dist/, checked, installed in a fresh environment and tested from there
# make docs   the documentation as a site, into site/; a link or an anchor that leads nowhere is an error
# Each first makes .venv with what it needs from the package index, once: again only when setup.py
# or constraints.txt has changed. All share that folder, so the second one has little to install.
# make oldest, make newest   at either end of the range of torch and Triton, the tests that need few other packages;
#             each makes an environment of its own, .venv-oldest or .venv-newest, of 5 GB; weekly in CI
# make oldest-trl            the trainer's tests with the oldest TRL, in an environment of their own
#
#   make test PYTHON=python3.12          another interpreter (after `make clean`)
#   make test ARGS="plain compile"       some parts only; ARGS="slow": what is long; make demo ARGS="--help"
#   make bench ARGS="main"               some sets only (--list: which); draw them: python -m benchmarks.report --write

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# What was installed, by content and place: a moved folder or a new pin installs again.
KEY := $(shell { pwd; cat setup.py constraints.txt; } | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help demo check test bench lint docs dist oldest oldest-trl newest venv clean

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

demo: venv
	@$(call install,train)
	$(PY) -m asft_kernels.demo $(ARGS)

test: venv
	@$(call install,test)
	@echo "== fetching a small real language model, which some tests use (93 MB, once)"
	@$(PY) -m asft_kernels.models.smollm2 || echo "== going on without it: those tests say that they skip"
	$(PY) tests/run.py $(ARGS)

check: lint
	$(PY) tests/run.py quick

# A run that was cut off goes on when started again.
bench: venv
	@$(call install,bench)
	@$(if $(ARGS),$(PY) -m benchmarks.run $(ARGS),code=0; $(PY) -m benchmarks.run || code=$$?; \
	$(PY) -m benchmarks.accuracy || code=$$?; $(PY) -m benchmarks.report --write && exit $$code)

lint: venv
	@$(call install,dev,test)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

dist: venv
	@$(call install,dev,test)
	rm -rf dist
	$(PY) -m build
	$(PY) -m twine check --strict dist/*
	$(PY) tests/dist.py

docs: venv
	@$(call install,docs)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

# Triton 3.6's interpreter does not go with NumPy 2.4. The other packages are those of constraints.txt.
oldest: ENDS := torch==2.11.0 triton==3.6.0 'numpy<2.4'
newest: ENDS := torch==2.15.0 triton==3.9.0 numpy
oldest newest:
	@$(MAKE) --no-print-directory venv VENV=.venv-$@
	@grep -vE '^(torch|triton|numpy)=' constraints.txt >.venv-$@/constraints.txt
	.venv-$@/bin/python -m pip install -c .venv-$@/constraints.txt $(ENDS) hypothesis pytest pytest-xdist tqdm
	.venv-$@/bin/python tests/run.py $(or $(ARGS),plain compile)

# The trainer's tests with the oldest TRL that setup.py admits.
oldest-trl:
	@$(MAKE) --no-print-directory venv VENV=.venv-$@
	@grep -vE '^trl=' constraints.txt >.venv-$@/constraints.txt
	.venv-$@/bin/python -m pip install -c .venv-$@/constraints.txt -e ".[test]" trl==1.15.0
	.venv-$@/bin/python -m pytest -n logical tests/test_patch_trl.py tests/test_parity_trl.py \
	    tests/test_preference_trainer.py tests/test_trainer_objectives.py tests/test_train_command.py tests/test_images.py

venv:
	@if $(PY) -m pip --version >/dev/null 2>&1; then exit 0; fi; \
	if ! $(PYTHON) -c '' 2>/dev/null; then \
	    echo "make: '$(PYTHON)' is no Python that runs here; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; fi; \
	if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then \
	    echo "make: '$(PYTHON)' is $$($(PYTHON) --version 2>&1), need Python 3.10 or newer; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; fi; \
	if ! $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null; then \
	    echo "make: '$(PYTHON)' cannot make virtual environments: its module venv or ensurepip is missing" >&2; \
	    echo "      (on Debian and Ubuntu: apt-get install python3-venv; elsewhere name another: make $(MAKECMDGOALS) PYTHON=...)" >&2; exit 1; fi; \
	echo "== making $(VENV) with $$($(PYTHON) --version 2>&1)"; \
	$(PYTHON) -m venv --clear "$(VENV)"

# $(call install,extra[,extra]): torch and triton alone first, at the pinned versions, as they are
# by far the largest and everything else is resolved around them.
comma := ,
extras = $(1)$(if $(2),$(comma)$(2))
define install
if [ -e "$(VENV)/.installed-$(1)-$(KEY)" ]; then \
    echo "== $(VENV) already has what $@ needs"; \
else \
    set -e; \
    echo "== installing torch and triton into $(VENV) (the first time this may download a lot)"; \
    $(PIP) install -c constraints.txt -e .; \
    echo "== installing the packages of the extra [$(extras)]"; \
    $(PIP) install -c constraints.txt -e ".[$(extras)]"; \
    rm -f "$(VENV)"/.installed-$(1)-*; \
    touch "$(VENV)/.installed-$(1)-$(KEY)"; \
fi
endef

clean:
	@if [ -e "$(VENV)/pyvenv.cfg" ]; then echo "== removing $(VENV)"; rm -rf "$(VENV)"; fi
