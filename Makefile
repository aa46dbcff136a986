# `make demo` and `make test` need nothing but python3 and a package index; both install into .venv.
VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python

.PHONY: demo test clean

demo: $(VENV)/demo
	$(PY) examples/contested/run.py

test: $(VENV)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest

$(VENV)/demo $(VENV)/dev: $(VENV)/%: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) runs
