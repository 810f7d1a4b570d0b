# Only Python >= 3.10 and make are needed: each target does its own set-up, once.
#   make demo    convert the embedded models and verify the results
#   make test    ruff, mypy and the tests
#   make docs    the documentation as a site, build/site/index.html
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DOCS   := $(VENV)/.docs-installed

# The models of the tests are small: one thread for each of pytest's workers is fastest.
test slow: export OMP_NUM_THREADS = 1

.PHONY: demo test lint slow docs clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(BIN)/normconvert demo

test: lint
	$(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/python -m ruff check
	$(BIN)/lint-imports
	$(BIN)/python -m mypy

# The long tests as well (minutes each).
slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m slow

# Strictly: a link, an anchor or a page that is not there is an error. (With --quiet mkdocs counts no warnings.)
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(DOCS)
	@mkdir -p build
	@$(BIN)/python -m mkdocs build --strict 2>build/docs.log || { cat build/docs.log >&2; exit 1; }
	@echo "built build/site/index.html"

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

# Installed again when the dependencies change.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "normconvert needs Python 3.10 or newer; choose one with: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing normconvert and what it needs into $(VENV): some minutes, once"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
