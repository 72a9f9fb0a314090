# What a user types. Everything lands in .venv; versions come from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test check working waiting fast browser size clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "raysweep needs Python 3.11 or newer: make install PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/raysweep run search_spaces/laptop.yaml

# ruff, pyright and import-linter, then every test that needs no GPU: one part after the other, since
# a Ray on busy cores does not start in time.
test: check browser working waiting

# The tests that wait for Ray or a browser more than they work: two files at a time, since those of
# a file share a cluster.
waiting: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "(ray or browser) and not gpu"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

# The tests without Ray or a browser, some on each core; and those of them that take no seconds.
WITHOUT = not gpu and not ray and not browser
working: WHICH = $(WITHOUT)
fast: WHICH = $(WITHOUT) and not slow
working fast: $(STAMP)
	$(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder -m "$(WHICH)"

# Headless Chromium for the tests of the report's page.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
	command -v google-chrome >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
	echo "no Chromium found and none could be installed: the browser tests will be skipped"

# Lines and files of each package.
size:
	@$(PYTHON) -m benchmarks.size

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
