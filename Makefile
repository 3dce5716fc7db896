# `make demo` and `make test` do everything on a fresh machine; each makes .venv itself.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
BUDGET ?= 80s

.PHONY: demo test check clean

# torch goes first: asked for by another package, pip might pick another build of it.
.venv/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastvlp needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "Making .venv (the first time takes a few minutes: PyTorch is large)"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.core
	@$(PIP) -e '.[dev]'
	@touch $@

demo: .venv/.core  ## embedded corpus -> FLM, MLM, AR and PrefixLM at equal time -> table and report
	@.venv/bin/vlp data demo --out demo/world
	@.venv/bin/vlp compare flm_demo mlm_demo ar_demo prefixlm_demo --budget $(BUDGET) --marks 0.5 1 \
	  --probe-steps 200 --probe-batch 32 --probe-lr 1e-3 --probe-items 800 --cloze-items 128 --out demo/report
	@echo "The report: demo/report/report.html"

test: .venv/.dev  ## all tests
	@.venv/bin/python -m pytest -n 2

check: .venv/.dev  ## format, lint, types, fast tests
	.venv/bin/ruff format --check src tests bench
	.venv/bin/ruff check src tests bench
	.venv/bin/mypy
	.venv/bin/python -m pytest -n 2 -m 'not slow'

clean:
	rm -rf .venv demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
