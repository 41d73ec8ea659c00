# Every target sets up .venv by itself; PYTHON chooses the interpreter it is made with (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
# One release of torch without a GPU, where a small CPU build may be at hand; the newest with one.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)

# The oldest and the newest release of transformers that setup.cfg allows.
TRANSFORMERS := 5.17.0 5.24.0

.PHONY: demo test test-versions lint docs bench clean

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf_lnfree needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[test,lint]"
	touch $@

demo: .venv/installed
	$(BIN)/hf-lnfree demo --out runs/demo $(DEMO_FLAGS)

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile $(TEST_FLAGS)

test-versions: $(TRANSFORMERS:%=test-transformers-%)

# One environment a release, kept between calls.
test-transformers-%:
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade pip
	.venv-$*/bin/python -m pip install --quiet "$(TORCH)"
	.venv-$*/bin/python -m pip install --quiet -e ".[test]" "transformers==$*"
	.venv-$*/bin/python -m pytest -n 2 --dist loadfile $(TEST_FLAGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

bench: .venv/installed
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf .venv .venv-* runs build docs/_build docs/reference/generated *.egg-info .pytest_cache .mypy_cache .ruff_cache
