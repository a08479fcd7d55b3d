# `make demo` and `make test` do all the set-up that they need, in a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= .ci/constraints.txt
# A demo's name (tag, sparsity, text, stability), and DATA=mnist=DIR for its noise curves on MNIST.
DEMO ?= tag
DATA ?= digits
OUTPUT ?= demo-output
# Folder with mnist/, nhanes/, pneumonia/, imdb_counterfactual/ and atex_fashion/ for the benchmarks that
# read them; the others run without. AUTHORS_CODE: suinleelab/attributionpriors, to run its own loop.
DATA_DIR ?=
AUTHORS_CODE ?=
BENCH_OUTPUT ?= bench-output
# Processes for tests and mutants; each keeps to one thread.
JOBS ?= 2

# What test-oldest installs beside the others.
OLDEST ?= captum==0.8.0

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# What the demo needs; the development tools bring it along.
INSTALLED_DEMO := $(VENV)/.installed-demo

.PHONY: demo picture test mutants test-oldest tutorials tutorials-write docs bench tables package lint clean

demo: $(INSTALLED_DEMO)
	$(BIN)/python -m captum_priors $(DEMO) --data $(DATA) --output $(OUTPUT)

# The README's picture: the demo's on its default data.
picture:
	$(MAKE) demo DEMO=tag DATA=digits
	cp $(OUTPUT)/report.png docs/images/demo.png

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS)

# Small mistakes, one at a time, each with the test that has to see it; PARTS of their names, files or
# tests choose some.
mutants: $(INSTALLED)
	$(BIN)/python -m tests.mutants --jobs $(JOBS) $(PARTS)

# What depends on Captum's code, on the oldest Captum that pyproject.toml allows, or on all of
# OLDEST='-r .ci/oldest.txt'.
test-oldest: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/oldest $(OLDEST)
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest -q -n $(JOBS) tests/adapters tests/attr tests/test_laws.py \
		$(if $(findstring -r,$(OLDEST)),,--ignore-glob='tests/adapters/test_shap*') -m 'not slow'

# The notebooks from top to bottom, with warnings as errors; the files stay as they are.
tutorials: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tutorials/run.py --jobs $(JOBS)

# The same, keeping their outputs.
tutorials-write: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tutorials/run.py --jobs $(JOBS) --write

# The site, into docs/_build/html; anything unresolved is an error. External links are not tried.
docs: $(INSTALLED)
	rm -rf docs/_build
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	$(BIN)/python docs/check_links.py docs/_build/html
	$(BIN)/python docs/check_browser.py docs/_build/html

# Every benchmark, at a size that fits into half an hour; FULL=1 for the size of the figures in
# benchmarks/results, which BENCH_OUTPUT=benchmarks/results replaces, and more for the stability study.
bench: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run_all.py --output $(BENCH_OUTPUT) \
		$(if $(DATA_DIR),--data-dir $(DATA_DIR)) $(if $(FULL),--full) \
		$(if $(AUTHORS_CODE),--authors-code $(AUTHORS_CODE))

# The site's tables, from the registries and benchmarks/results.
tables: $(INSTALLED)
	$(BIN)/python -m tests.support_table

# The distributions, into dist; the source distribution has what its tests read. RELEASE is the
# version that they have to be of.
package: $(INSTALLED)
	rm -rf dist build/sdist
	$(BIN)/python -m build --outdir dist .
	mkdir -p build/sdist
	tar -xzf dist/*.tar.gz -C build/sdist --strip-components 1
	$(if $(RELEASE),test -f dist/captum_priors-$(RELEASE).tar.gz)
	cd build/sdist && OMP_NUM_THREADS=1 PYTHONPATH=. $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider \
		tests/test_public_api.py tests/test_readme.py tests/test_package.py tests/docs/test_site.py tests/penalties

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Whichever comes first makes the environment; the other adds to it.
define install
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[$(1)]"
endef

$(INSTALLED_DEMO): pyproject.toml $(CONSTRAINTS)
	$(call install,demo)
	touch $@

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(call install,dev)
	touch $(INSTALLED_DEMO) $@

clean:
	rm -rf $(VENV) $(OUTPUT) $(BENCH_OUTPUT) docs/_build docs/api docs/tutorials build dist .mypy_cache .pytest_cache .ruff_cache
