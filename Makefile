# Each target does all its own set-up in .venv, whatever environment is active, and only once.
#   ARGS="--traces FILE"   more arguments for the command behind demo, test, test-all or bench
#   PYTHON=python3.12   the interpreter .venv is made from
#   TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"   what to install as torch
PYTHON ?= python3
TORCH ?= torch==2.13.0

PY := .venv/bin/python
CSRC := $(shell find csrc -type f 2>/dev/null)
# A thread that waits leaves its core to those that work: spinning, each of the two processes costs
# 2.5 times as much.
PYTEST = OMP_WAIT_POLICY=passive $(PY) -m pytest -n 2
# File after file, so that what the tests of a file share is made once.
SUITE = $(PYTEST) --dist loadfile --no-loadscope-reorder
CXX_FILES = find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'

.PHONY: demo test test-all stress lint docs bench wheel sdist clean

demo: .venv/.ready
	$(PY) -m reasonkern demo $(ARGS)

test: lint
	$(SUITE) -m "not slow and not peers" $(ARGS)

# With "=": after a space pytest takes a file that is there for what to collect.
test-all: lint .venv/.peers
	$(SUITE) --summary=docs/test-all.md $(ARGS)

# Fuzzing, threads, processes, pickles, what may be absent; then the CPU library under sanitizers.
# STRESS_EXAMPLES=10000   calls per family
stress: .venv/.ready
	$(PYTEST) --dist worksteal tests/stress -o faulthandler_timeout=1800 $(ARGS)
	$(PY) tests/stress/sanitize.py

lint: .venv/.ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(CXX_FILES) | xargs -r .venv/bin/clang-format --dry-run -Werror

# The API reference and the pages of the repository, from docs/_build/index.html. Any warning, a
# broken link or the name of something that does not exist among them, is an error.
docs: .venv/.docs
	$(PY) -m sphinx -q -E -W --keep-going -b html -c docs . docs/_build
	echo '<meta http-equiv="refresh" content="0; url=README.html">' > docs/_build/index.html
	@echo "docs/_build/index.html"

bench: .venv/.ready
	$(PY) -m benchmarks $(ARGS)

# Setuptools keeps build/lib between builds, and with it modules that have been deleted since.
wheel: .venv/.ready
	rm -rf build/lib* build/bdist*
	$(PY) -m pip wheel -q --no-deps --no-build-isolation -w dist .

sdist: .venv/.ready
	$(PY) -m build -q --no-isolation --sdist --outdir dist .

clean:
	rm -rf .venv build dist *.egg-info reasonkern/*.so tests/*_sim/_build docs/_build docs/api
	rm -rf .pytest_cache .mypy_cache .ruff_cache

.venv/.torch:
	@echo "Setting up .venv: a few minutes and, unless torch is there, its download; pip is quiet."
	$(PYTHON) -m venv .venv
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install -q $(TORCH)
	$(PY) -c "import triton" 2>/dev/null || $(PY) -m pip install -q "triton==3.6.0; platform_system == 'Linux'"
	$(PY) -m pip install -q "setuptools>=64" wheel ninja "numpy<2.4"
	touch $@

.venv/.ready: .venv/.torch pyproject.toml setup.py $(CSRC)
	@echo "Building the library and installing what demo and tests need: a minute or two; pip is quiet."
	$(PY) -m pip install -q --no-build-isolation -e ".[demo,test,lint,bench]"
	touch $@

.venv/.docs: .venv/.ready
	$(PY) -m pip install -q "reasonkern[docs]"
	touch $@

.venv/.peers: .venv/.ready
	$(PY) -m pip install -q "reasonkern[peers]"
	$(PY) -m pip install -q --no-deps verl==0.9.1 openrlhf==0.11.2
	touch $@
