# make demo: train a Mixture-of-Experts model and its dense twin on real text, over three seeds, say which is better, and
# show what each expert does.
# make test: run the tests. Both create .venv and install on first use; both can be repeated.
# make kernels: the tests that `make test` leaves out: compile every kernel for every GPU (minutes; if none changed, seconds).
# make nightly: a hundred kills at random times of a training, in one process and with two ranks, and whatever else takes
# long (an hour).
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo "$$p"; break; }; done)
PY := .venv/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check

.PHONY: demo test kernels nightly lint clean
demo: .venv/installed
	$(PY) -m experiments.compare experiment=demo seeds=[0,1,2] margin=0.01 run=runs/demo resume=true
	$(PY) -m experiments.inspector run=runs/demo/moe-seed0

test: .venv/installed-test
	$(PY) -m pytest -n logical --maxprocesses 4 --dist worksteal

kernels: .venv/installed-test
	$(PY) -m pytest -m aot tests/kernels

nightly: .venv/installed-test
	$(PY) -m pytest -m nightly tests

lint: .venv/installed-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Switchyard needs Python 3.11, 3.12 or 3.13 on the PATH, or PYTHON=/path/to/it." >&2; exit 1; }
	"$(PYTHON)" -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	@echo "installing into .venv (a minute or two)"
	$(PIP) -e '.[inspect]'
	@touch $@

.venv/installed-test: pyproject.toml | .venv/bin/python
	@echo "installing into .venv (a minute or two)"
	$(PIP) -e '.[test]'
	@touch $@ .venv/installed

clean:
	rm -rf .venv runs build *.egg-info
