# Targets install what they need into .venv; PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv-$(notdir $(PYTHON))
RUN := $(VENV)/bin/python
PIP_INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check
DEMO ?= runs/demo
METHODS := lw_fedssl,layerwise,prog_fedssl,end_to_end

.PHONY: demo test quick coverage lint test-targets docs dist try-wheel requirements clean

# Installed once per change of the packaging files; an incomplete environment is created again.
$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP_INSTALL) -e .
	touch $@

$(VENV)/installed-for-tests: $(VENV)/installed
	$(PIP_INSTALL) -e '.[test]'
	touch $@

$(VENV)/installed-for-dist: $(VENV)/installed
	$(PIP_INSTALL) -e '.[dist]'
	touch $@

$(VENV)/installed-for-docs: $(VENV)/installed
	$(PIP_INSTALL) -e '.[docs]'
	touch $@

# Four methods on scikit-learn's digits, then a report. An interrupted demo is resumed.
demo: $(VENV)/installed
	@$(RUN) -m experiments.sweep --preset=quickstart --methods=$(METHODS) --output=$(DEMO)
	@$(RUN) -m experiments.report --workdirs=$(DEMO) --output=$(DEMO)/report

lint: $(VENV)/installed-for-tests
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports
	$(RUN) -m mypy

# Two workers, on two cores; they share what is compiled.
PYTEST := $(RUN) -m pytest --numprocesses=2 --dist=loadgroup --no-loadscope-reorder

test: lint
	$(PYTEST) --durations=15

# Without the files that train and compile most.
quick: lint
	$(PYTEST) -m 'not slow'

# Programs compiled for TPUs too; installs their compiler, 684 MB.
test-targets: $(VENV)/installed-for-tests
	$(PIP_INSTALL) -e '.[tpu-aot]'
	$(RUN) -m pytest tests/resources/test_target_compile.py

coverage: $(VENV)/installed-for-tests
	$(PYTEST) --cov --cov-report=term:skip-covered

# The site of the documents, in site/: a link that leads nowhere or a page outside the navigation is an error.
docs: $(VENV)/installed-for-docs
	$(RUN) -m mkdocs build --strict

# The wheel and the source distribution, checked, in dist/.
dist: $(VENV)/installed-for-dist
	rm -rf build dist
	$(RUN) -m build
	$(RUN) -m twine check --strict dist/*
	$(VENV)/bin/check-wheel-contents dist/*.whl

# Installs the wheel in a new environment; runs every command and the notebook outside the checkout. Six minutes on one
# busy core.
try-wheel:
	$(PYTHON) .ci/try_wheel.py

# Rewrites requirements.txt from the installed versions.
requirements: $(VENV)/installed-for-tests
	$(RUN) .ci/pin.py > requirements.txt.new
	mv requirements.txt.new requirements.txt

clean:
	rm -rf .venv-* .cache runs build dist site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
