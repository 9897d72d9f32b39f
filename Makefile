# make demo   from one warm start: uniform budgets, uniform with twice the rollouts, the knapsack; and compare
# make pod    two processes on this machine that train one policy
# make test   the test suite
# make slow   tests that take minutes each: several processes; compiled as for users
# make check  format, lint, types
# make site   the documentation as web pages in site/; begin at site/index.html
# make clean  remove what make demo wrote (.venv stays)

PYTHON ?= python3
VENV := .venv
RUNS ?= runs/demo
PORT ?= 9876
TRAIN = JAX_COMPILATION_CACHE_DIR=$(RUNS)/compiled $(VENV)/bin/python train.py \
  --config configs/operators.py --config.eval.samples=8 --config.sft.dir=$(RUNS)/sft
INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo pod test slow check site clean

demo: $(VENV)/runtime-installed
	@$(TRAIN) --workdir $(RUNS)/uniform --config.alloc.rule=uniform
	@$(TRAIN) --workdir $(RUNS)/uniform_512 --config.alloc.rule=uniform --config.alloc.budget=512
	@$(TRAIN) --workdir $(RUNS)/knapsack
	@echo
	@$(VENV)/bin/python -m krl.run.report $(RUNS)/uniform $(RUNS)/uniform_512 $(RUNS)/knapsack --out $(RUNS)

pod: $(VENV)/runtime-installed
	@$(TRAIN) --workdir $(RUNS)/warm --config.steps=0
	@export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1; \
	for process in 1 0; do \
	  $(TRAIN) --workdir $(RUNS)/pod --config.steps=40 --config.mesh.shape="(2,)" --config.distributed.coordinator=127.0.0.1:$(PORT) \
	    --config.distributed.processes=2 --config.distributed.process=$$process & all="$$all $$!"; \
	done; \
	for process in $$all; do wait $$process || exit; done

test: $(VENV)/dev-installed
	$(VENV)/bin/python -m pytest

slow: $(VENV)/dev-installed
	XLA_FLAGS= $(VENV)/bin/python -m pytest -m slow tests

check: $(VENV)/dev-installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

site: $(VENV)/docs-installed
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "documentation: site/index.html"

clean:
	rm -rf $(RUNS)

# A stamp is written only after an installation ended well, so one that was cut off is done again.
$(VENV)/runtime-installed: requirements.txt | $(VENV)/bin/python
	@echo "installing requirements.txt into $(VENV) (once, a minute or so)"
	@$(INSTALL) -r requirements.txt
	@touch $@

$(VENV)/dev-installed: pyproject.toml $(VENV)/runtime-installed
	@echo "installing the test tools into $(VENV)"
	@$(INSTALL) --editable '.[dev]'
	@touch $@

$(VENV)/docs-installed: pyproject.toml $(VENV)/runtime-installed
	@echo "installing mkdocs into $(VENV)"
	@$(INSTALL) --editable '.[docs]'
	@touch $@

$(VENV)/bin/python:
	@for python in $(PYTHON) python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	  then exec $$python -m venv $(VENV); fi; \
	done; \
	echo "krl needs Python 3.11 or newer with venv and pip, and found none as $(PYTHON) or python3.11 to 3.13." >&2; \
	echo "Install one (Debian: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3.12" >&2; \
	exit 1
