# make run    install into .venv and run the demo        make test   install and run lint, types and every test
# PYTHON=python3.12 chooses the interpreter; VENV= (empty) or MOE_GPU_NO_INSTALL=1 uses it as it is and installs nothing.
# MOE_GPU_TORCH="torch==2.13.0" chooses another PyTorch than scripts/install.py would.

PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= moe-gpu-output
ARGS ?=

ifneq ($(strip $(MOE_GPU_NO_INSTALL)),)
override VENV :=
endif

ifeq ($(strip $(VENV)),)
RUN := $(PYTHON)
RUN_STAMP :=
TEST_STAMP :=
else
RUN := $(VENV)/bin/python
RUN_STAMP := $(VENV)/.installed-run
TEST_STAMP := $(VENV)/.installed-test
endif

.PHONY: help run test lint clean

help:
	@sed -n 's/^# //p' Makefile

run: $(RUN_STAMP)
	$(RUN) -m moe_gpu demo --output-dir $(OUTPUT) $(ARGS)

test: $(TEST_STAMP)
	$(RUN) scripts/run_tests.py $(ARGS)

lint: $(TEST_STAMP)
	$(RUN) scripts/run_tests.py --only lint

$(VENV)/.installed-run: pyproject.toml scripts/install.py
	$(PYTHON) scripts/install.py --venv $(VENV) --extras viz
	@touch $@

$(VENV)/.installed-test: pyproject.toml scripts/install.py
	$(PYTHON) scripts/install.py --venv $(VENV) --extras dev
	@touch $@ $(RUN_STAMP)

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
