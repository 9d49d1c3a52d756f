# Two commands do everything on a machine with Python 3.11+ and make: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-fast test-slow test-crash lint format clean

# The stamp makes a second call cheap: pip runs again only when the metadata or the pins change.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 13) else f'got Python {v[0]}.{v[1]} → expected 3.11 to 3.13 → call make PYTHON=python3.11')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[report,dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/mil demo --out demo

# A process per core, files whole; more threads than that would wait for each other.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not slow_compile"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow_compile

# Takes half an hour: writers killed and raced 1,000 times, stores damaged byte by byte. The counts are printed.
test-crash: $(STAMP)
	TESSERA_CRASH_ROUNDS=1000 TESSERA_RACE_ROUNDS=1000 TESSERA_MODEL_RUNS=300 $(BIN)/python -m pytest -rP \
		tests/test_extract/store/test_crash.py tests/test_extract/store/test_races.py tests/test_extract/store/test_damage.py \
		tests/test_extract/store/test_faults.py tests/test_extract/store/test_store_model.py

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
