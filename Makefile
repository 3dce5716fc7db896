# `make demo` and `make test` do everything on a fresh machine; each makes .venv itself. `make serve` shows what the demo made.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Seconds of training for each recipe.
BUDGET ?= 80

.PHONY: demo serve test check docs clean

# torch goes first: asked for by another package, pip might pick another build of it.
.venv/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastvlp needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "Making .venv (the first time takes a few minutes: PyTorch is large)"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.core
	@$(PIP) -e '.[dev,docs,serve,pg]'
	@touch $@

.venv/.serve: .venv/.core
	@$(PIP) -e '.[serve]'
	@touch $@

demo: .venv/.core  ## embedded corpus -> FLM, MLM, AR and PrefixLM at equal time -> table and report; FLIP for search
	@.venv/bin/vlp data demo --out demo/world
	@rm -rf demo/report
	@.venv/bin/vlp compare flm_demo mlm_demo ar_demo prefixlm_demo --budget $(BUDGET)s \
	  --probe-steps 200 --probe-batch 32 --probe-lr 1e-3 --probe-items 800 --cloze-items 128 --out demo/report
	@rm -rf demo/flip demo/export demo/index
	@.venv/bin/vlp pretrain flip_demo --steps 600 --out demo/flip
	@echo "How well it searches, beside chance:"
	@.venv/bin/vlp evaluate retrieval demo/flip --data demo/world --split val
	@.venv/bin/vlp export demo/flip demo/export
	@echo "Next: open demo/report/report.html, and search the pictures by words, at http://127.0.0.1:8000/: make serve"
	@echo "Your own pairs: vlp data import PAIRS.csv --out photos --val 0.1, then vlp compare flm_photos mlm_photos --budget 1h"

serve: .venv/.serve  ## a page that searches the demo's test pictures
	@test -d demo/export || { echo "There is no model yet: make demo"; exit 1; }
	@test -d demo/index || .venv/bin/vlp index build demo/index --export demo/export --data demo/world/test
	@.venv/bin/vlp serve demo/export --index demo/index --report demo/report/report.html

test: .venv/.dev  ## all tests
	@.venv/bin/python -m pytest -n 2

check: .venv/.dev  ## format, lint, types, fast tests
	.venv/bin/ruff format --check src tests bench
	.venv/bin/ruff check src tests bench
	.venv/bin/mypy
	.venv/bin/python -m pytest -n 2 -m 'not slow'

.venv/.docs: .venv/.core
	@$(PIP) -e '.[docs]'
	@touch $@

docs: .venv/.docs  ## the documentation site, in site/; no warning and no dead link passes
	.venv/bin/zensical build --strict --clean

clean:
	rm -rf site .venv demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
