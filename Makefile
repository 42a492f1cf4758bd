# Every command does its own set-up: `make demo` and `make test` work in a fresh clone.
# The set-up is `.venv`, made once and again when pyproject.toml or constraints.txt change.
#   make PYTHON=python3.12 ...     another Python than python3 (for a .venv that does not exist yet)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test tests portable soak check bench clean distclean

help:
	@echo 'make demo       train 4 workers on handwritten digits (under two minutes), then a table'
	@echo 'make test       the whole test suite'
	@echo 'make check      format, lint, types, and the tests with warnings as errors'
	@echo 'make portable   its numerical part, as if on older processors and with two threads'
	@echo 'make soak       kill runs fifty times and resume them (half an hour)'
	@echo 'make bench      what a local step, a synchronisation, a checkpoint and the data cost'
	@echo 'make install    the set-up alone, which each of these does first if need be'
	@echo 'make clean      remove caches and runs/demo (make distclean: .venv too)'

install: $(STAMP)

demo: install
	$(BIN)/python tools/demo.py

# Two files at a time, since many tests leave a core idle; a file's tests stay together and in order, the files
# in that of tests/conftest.py. Compiled once, even where Python is told to write no bytecode: the tests start
# many hundred processes.
TESTS := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test tests: install
	$(BIN)/python -m compileall -q resist_ds tests tools
	$(TESTS)

# Other kernels round otherwise: no test may hang on that. Not part of `make test`, since its results are of the tests.
portable: install
	$(BIN)/python tools/portable.py

# Fifty seeded SIGKILLs of ranks and launchers, most of them in the middle of a save.
soak: install
	$(BIN)/python -m pytest -m soak -s

# Warnings are errors in every run of the tests: filterwarnings in pyproject.toml.
check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy resist_ds
	$(TESTS)

bench: install
	$(BIN)/python tools/bench.py

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs/demo
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# The stamp comes last, so a set-up that failed or was interrupted is taken up again by the next command.
# DeepSpeed comes as source. It is built in isolation, with the pinned setuptools and without torch (it finds
# out about torch when it runs); DS_BUILD_OPS=0: none of its C++/CUDA operations is built ahead.
# pip before 25.3 takes the versions of a build's own requirements from PIP_CONSTRAINT, later ones from
# PIP_BUILD_CONSTRAINT. pip compiles bytecode by default and uv when asked to: a rank's imports then take
# 5 s at the first start, and not 12.
$(STAMP): export DS_BUILD_OPS = 0
$(STAMP): export PIP_CONSTRAINT = constraints.txt
$(STAMP): export PIP_BUILD_CONSTRAINT = constraints.txt
$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  have=$$("$(PYTHON)" -c 'import platform; print(platform.python_version())' 2>/dev/null) || have='not here'; \
	  echo "make: Python 3.11 or newer is needed, $(PYTHON) is $$have; name another: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	@echo 'Setting up $(VENV): downloads about 2.7 GB and takes about 6.3 GB on disk (most of it PyTorch with CUDA).'
	@set -eu; if command -v uv >/dev/null; then \
	  $(BIN)/python -c '' 2>/dev/null || { rm -rf $(VENV); uv venv --quiet --python "$(PYTHON)" $(VENV); }; \
	  uv pip install --python $(BIN)/python --compile-bytecode \
	    --constraint constraints.txt --build-constraint constraints.txt -e '.[dev]'; \
	else \
	  $(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV); "$(PYTHON)" -m venv $(VENV); } || { \
	    rm -rf $(VENV); \
	    echo "make: $(PYTHON) cannot make a virtual environment: install its venv module, or uv" >&2; exit 1; }; \
	  $(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'; \
	fi
	@touch $@
