# The commands of this project. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
EXTRAS ?= dev
UNUSED := transformers/models/(?!auto|llama|mistral|qwen|gemma)|/tests?/|plotly/(graph_objs|validators)
STAMP  := $(VENV)/.installed-$(EXTRAS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow cluster-test check bench clean

help:  ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv with the tested versions (no CUDA download on a CPU machine)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "Python 3.11, 3.12 or 3.13 is needed; $$($(PYTHON) --version) found. Run: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[$(EXTRAS)]'
	@$(BIN)/python -m compileall -qq -j 0 -x '$(UNUSED)' $(VENV)/lib || true  # on all cores, which pip doesn't
	@touch $@

demo: setup  ## fine-tune, merge and score on the legal texts of this machine (5 to 7 minutes on 2 cores)
	$(BIN)/python -m qlora_dist.launch +experiment=legal

test: setup  ## run the tests (under 10 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not slow and not gpu and not cluster" -n 2 --dist loadfile

test-slow: setup  ## run the long tests too
	$(BIN)/python -m pytest -m "slow and not gpu and not cluster" -n 2 --dist loadfile

cluster-test: setup  ## run plans on real clusters that are started on this machine (wants root)
	@tests/cluster/install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS),ray]'
	$(BIN)/python -m pytest -m cluster -n 0 tests/cluster

check: setup  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: setup  ## run the benchmarks; they write to benchmarks/results/
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

clean:  ## remove caches and runs, not .venv
	rm -rf runs .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
