# Only Python >= 3.10 and make are needed: each target does its own set-up, once, with uv where that is there.
#   make demo    convert the embedded models and verify the results
#   make test    ruff, mypy and the tests
#   make test-lowest  the demo and the quick tests with the lowest versions that pyproject.toml allows
#   make docs    the documentation as a site, build/site/index.html
PYTHON ?= python3
VENV   := .venv
BIN     = $(VENV)/bin
STAMP  := $(VENV)/.installed
DEV    := $(VENV)/.dev-installed
DOCS   := $(VENV)/.docs-installed
LOWEST := $(VENV)-lowest/.installed
# Something of every stage; what is not here is about the docs, the browser, speed, or releases newer than these.
QUICK  := tests/setup/test_bounds.py tests/compat tests/plan tests/tracing tests/runtime tests/sources \
	tests/analysis/test_streams.py tests/analysis/test_norms.py tests/rewrites/test_fuse_bn.py \
	tests/rewrites/test_crmsnorm.py tests/apply tests/verification/test_verify.py tests/cli/test_cli.py

BEGUN  := $(shell date +%s)
READY   = @echo "set up in $$(($$(date +%s) - $(BEGUN))) s: $(VENV), $$(du -sh $(VENV) | cut -f1)"
TIMED   = VENV=$(VENV) sh tools/setup/timed.sh
ifeq ($(shell command -v uv 2>/dev/null),)
CREATE  = $(PYTHON) -m venv $(VENV)
# Not compiled here: Python does that for the few modules that are used, when they are.
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --no-compile --editable
else
CREATE  = uv venv --seed --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV)
INSTALL = uv pip install --python $(BIN)/python --editable
endif

# What runs ten times a minute is compiled once: without a cache an interpreter that imports torch and transformers
# compiles them each time, which is half of a command's time. Containers often say that nothing is to be kept.
unexport PYTHONDONTWRITEBYTECODE

# The models of the tests are small: one thread for each of pytest's workers is fastest.
test test-lowest slow: export OMP_NUM_THREADS = 1

.PHONY: demo test test-lowest lint slow docs clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(BIN)/normconvert demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(DEV)
	$(BIN)/python -m ruff check
	$(BIN)/lint-imports
	$(BIN)/python -m mypy

test-lowest: VENV := $(VENV)-lowest
test-lowest: $(LOWEST)
	$(BIN)/normconvert demo
	$(BIN)/python -m pytest -n 2 --dist worksteal $(QUICK)

# The long tests as well (minutes each).
slow: $(DEV)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# Strictly: a link, an anchor or a page that is not there is an error. (With --quiet mkdocs counts no warnings.)
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(DOCS)
	@mkdir -p build
	@$(BIN)/python -m mkdocs build --strict 2>build/docs.log || { cat build/docs.log >&2; exit 1; }
	@echo "built build/site/index.html"

# Each installed again when the dependencies change.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "normconvert needs Python 3.10 or newer; choose one with: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
		|| { rm -rf $(VENV) && $(TIMED) "making $(VENV)" $(CREATE); }
	@$(TIMED) "installing normconvert with torch, transformers, timm and what they need, once" $(INSTALL) .
	@touch $@
	$(READY)

$(DEV): $(STAMP)
	@$(TIMED) "installing what the tests need, once" $(INSTALL) '.[dev]'
	@touch $@
	$(READY)

$(LOWEST): VENV := $(VENV)-lowest
$(LOWEST): pyproject.toml tools/setup/lowest.py
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
		|| { rm -rf $(VENV) && $(TIMED) "making $(VENV)" $(CREATE); }
	@$(BIN)/python tools/setup/lowest.py > $(VENV)/lowest.txt
	@$(TIMED) "installing the lowest versions" \
		$(INSTALL) '.[onnx,s3,data,adapter]' -c $(VENV)/lowest.txt \
		accelerate scikit-learn sentence-transformers pytest pytest-xdist hypothesis jsonschema ruff
	@touch $@
	$(READY)

$(DOCS): $(STAMP)
	@$(TIMED) "installing what the documentation needs, once" $(INSTALL) '.[docs]'
	@touch $@
	$(READY)

clean:
	rm -rf $(VENV) $(VENV)-lowest .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
