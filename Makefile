# `make demo` and `make test` work on a fresh machine: each makes .venv first. `make serve` serves the model of the demo.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# pip would compile on one core, and a quarter of it for nothing: tests of other packages, and a client of Kubernetes for chromadb.
COMPILE = .venv/bin/python -m compileall -qq -j 0 -x '/(tests|kubernetes)/' .venv/lib || true
# CPU seconds of training for each recipe.
BUDGET ?= 60

.PHONY: install demo serve pictures test check docs clean

# torch is installed first. As a dependency of another package, pip might choose another build of it.
.venv/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastvlp needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "Making .venv (the first time takes a few minutes: PyTorch is large)"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) -e .
	@$(COMPILE)
	@touch $@

.venv/.dev: .venv/.core
	@$(PIP) -e '.[dev,docs,serve,pg]'
	@touch $@

.venv/.serve: .venv/.core
	@$(PIP) -e '.[serve]'
	@$(COMPILE)
	@touch $@

install: .venv/.core  ## the package and the command vlp, in .venv

demo: .venv/.core  ## a small corpus -> a model that searches it; then FLM, MLM and AR at equal time -> report
	@.venv/bin/vlp data demo --level easy --out demo/easy --train 3000 --val 400 --test 600 --pairs 0 --singles 0
	@echo "1 of 2: train a model that searches the pictures by text (FLIP, 300 steps). It recognises colours, but hardly any shapes."
	@rm -rf demo/flip demo/export demo/index demo/report
	@.venv/bin/vlp pretrain flip_demo --steps 300 --threads 1 --out demo/flip \
	  --data.train demo/easy/train --data.val demo/easy/val --model.image.patch 12
	@.venv/bin/vlp evaluate retrieval demo/flip --data demo/easy --split test --above-chance
	@.venv/bin/vlp export demo/flip demo/export
	@echo "2 of 2: compare FLM, MLM and AR, trained for $(BUDGET) CPU seconds each; their scores include questions about pictures (VQA)."
	@.venv/bin/vlp compare flm_demo mlm_demo ar_demo --budget $(BUDGET)s --threads 1 \
	  --probe-steps 150 --probe-batch 64 --probe-lr 1e-3 --probe-items 1000 --out demo/report \
	  --set data.train=demo/easy/train data.val=demo/easy/val model.image.patch=24
	@echo "Next: open demo/report/report.html. To search the pictures by text at http://127.0.0.1:8000/, run: make serve"
	@echo "With your own pairs: source .venv/bin/activate; vlp data import PAIRS.csv --out photos --val 0.1; vlp compare flm_photos mlm_photos --budget 1h"

demo/index: | .venv/.serve
	@test -d demo/export || { echo "There is no model that searches: make demo"; exit 1; }
	@.venv/bin/vlp index build demo/index --export demo/export --data demo/easy/test

serve: .venv/.serve demo/index  ## a page that searches the demo's test pictures
	@.venv/bin/vlp serve demo/export --index demo/index --report demo/report/report.html

pictures: .venv/.dev demo/index  ## docs/report.png and docs/search.png from the demo's output; needs chromium
	@.venv/bin/python bench/pictures.py

# Three workers on two cores: each also waits for the disk and for processes of its own.
test: .venv/.dev  ## all tests
	@.venv/bin/python -m pytest -n 3

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
