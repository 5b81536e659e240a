# make demo   install, then the main job on the embedded digits run, with its defaults (three minutes)
# make test   install, then all tests
# make test-portable  the tests that compare bits or tolerances, again with the instructions of other processors
# make test-lowest  what other libraries' versions matter to, with the lowest that are allowed
# make lint   install, then format, lint and types
# make docs   install, then the documentation into build/docs; every tutorial is run
# make bench  the benchmarks; each prints a table and writes JSON to build/bench

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
JOBS ?= auto
# Every process that tests start would compile the package again, and every worker the tests.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test test-portable test-lowest lint format docs bench clean

help:
	@sed -n 's/^# //p' Makefile | head -7

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "merge_rl needs Python >= 3.10")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	@touch $@

demo: $(READY)
	rm -rf build/demo
	$(BIN)/mergerl demo build/demo
	$(BIN)/mergerl optimize build/demo/edm2 --out build/demo/run
	$(BIN)/mergerl sample build/demo/run/merged --num-images 100 --out build/demo/samples.png

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# Whatever the processor has beyond these instructions is left unused.
test-portable: $(READY)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m numerics
	ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m numerics

LOWEST := .venv-lowest
LOWEST_TESTS := tests/cli/options tests/cli/test_settings.py tests/config tests/core/merging tests/searchers \
	tests/storage/checkpoints tests/storage/files

$(LOWEST)/.ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --requirement constraints-lowest.txt
	@touch $@

test-lowest: $(LOWEST)/.ready
	PYTHONPATH=$(CURDIR) $(LOWEST)/bin/python -m pytest -n $(JOBS) --dist worksteal $(LOWEST_TESTS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

BENCHES := moments merge_speed convert reward_speed sampling_speed reference_speed extractors \
	precision_fid prdc_memory digits_search sample_efficiency ablation finetune scale simulate_cluster plan_accuracy campaign structure

bench: $(READY)
	mkdir -p build/bench
	for name in $(BENCHES); do \
		$(BIN)/python -m benchmarks.$$name --out build/bench/$$name.json || exit 1; \
	done

clean:
	rm -rf .venv .venv-lowest build
