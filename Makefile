# `make demo`, `make test`, `make bench` and `make docs` need nothing but python3 and a package index; all install into .venv.
VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python

.PHONY: demo test bench docs clean

demo: $(VENV)/demo
	$(PY) examples/contested/run.py

test: $(VENV)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -n 2 --dist loadfile

bench: $(VENV)/bench
	mkdir -p runs
	$(PY) -m pytest csrc_bench --benchmark-json=runs/bench.json
	$(PY) -m csrc_bench.compare runs/bench.json

# a warning is an error: a link that leads nowhere, a name that does not exist
docs: $(VENV)/docs
	$(PY) -m sphinx -W --keep-going -n -q -b html docs build/docs

$(VENV)/demo $(VENV)/dev $(VENV)/bench $(VENV)/docs: $(VENV)/%: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build runs
