# make run   train the cured model by executing notebook 05 (PARAMS="profile=smoke seed=1" sets its parameters)
# make test  every test, the notebooks included
# make lab   open JupyterLab on your own copies of the notebooks, in work/ (FRESH=1: new ones)
# make notebooks  the whole sequence, headless
.DEFAULT_GOAL := help
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PARAMS ?=
# Two tests at a time, each with one thread: more threads make small tensors slower.
TWO := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: help setup test-setup run test lab notebooks outputs claims docs-table bench record seeds detection healthy operators tools watch-cost studies ward true-size mutants health-wheel browser format

help:
	@echo "make setup | run | test | lab | notebooks | outputs | claims | docs-table | bench | record | seeds | detection | healthy | operators | tools | watch-cost | studies | ward | true-size | mutants | health-wheel | format; see README.md"

# Once: the stamp is newer than what it was made from, so a second call installs nothing.
setup: .venv/installed
.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python of at least 3.11 found; install one, or set PYTHON=…" >&2; exit 2; }
	@echo "installing the environment into .venv (once; a minute or more, and what the download takes)"
	$(PYTHON) -m venv .venv
	$(INSTALL) -e ".[lab]"
	@$(BIN)/python -c "import torch; print('torch', torch.__version__, 'with CUDA' if torch.version.cuda else 'for the CPU')"
	@du -sh .venv
	@touch $@

# What tests and comparisons need beside it: transformers, datasets, torchao, playwright, pytest, ruff
test-setup: .venv/tested
.venv/tested: .venv/installed
	@echo "installing what the tests need (once)"
	$(INSTALL) -e ".[lab,test]"
	@touch $@

run: setup
	@$(BIN)/python -m moe_lab notebook notebooks/05_fixed_training.ipynb $(PARAMS)

test: test-setup browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(TWO) --dist loadscope --no-loadscope-reorder tests
	MOE_LAB_PROFILE=smoke MOE_LAB_INTERACTIVE=0 $(TWO) --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout=300 notebooks

# The live dashboard is tested with real clicks. Any Chromium will do; else Debian's package or Playwright's build.
browser: test-setup
	@command -v chromium chromium-browser google-chrome >/dev/null \
	|| ls $${PLAYWRIGHT_BROWSERS_PATH:-$$HOME/.cache/ms-playwright}/chromium-* >/dev/null 2>&1 \
	|| { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo "installing Chromium for the browser test" \
	     && apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium fonts-dejavu-core >/dev/null; } \
	|| $(BIN)/python -m playwright install chromium \
	|| { echo "error: the browser test needs Chromium; install it with your system's packages" >&2; exit 2; }

# Working copies in work/, made once; FRESH=1 moves them aside and makes new ones. As root, in a container, too.
lab: setup
	@$(BIN)/python -m benchmarks.copies $(if $(FRESH),fresh)
	JUPYTER_CONFIG_PATH="$(CURDIR)/work/.jupyter$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" $(BIN)/python -m jupyter lab \
	  $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir="$(CURDIR)" $(LAB) work/00_start_here.ipynb

notebooks: setup  # 08 needs the extra hf
	$(INSTALL) -e ".[lab,hf]"
	$(BIN)/python -m moe_lab notebook all $(PARAMS)

# The one way to committed outputs: executes every notebook in profile lab, in place, from a clean tree, and writes down
# the minutes, the claims and their numbers in prose.
outputs: test-setup
	$(BIN)/python -m benchmarks.outputs
	$(MAKE) docs-table

# Every claim of every notebook in profile lab, those that a smaller run cannot meet included; last result and its minutes:
# benchmarks/claims.json
claims: test-setup
	$(BIN)/python -m benchmarks.outputs --claims

docs-table: setup
	$(BIN)/python -m benchmarks.docs_table

# Works of ours beside other libraries', a quarter of an hour on an idle machine; on a busy one with THREADS=1
bench: test-setup
	THREADS="$(THREADS)" $(BIN)/python -m benchmarks.bench

# Training time to a loss, against an older commit (AGAINST=…); KEPT="what changed" adds a line to docs/records.md,
# OF="COMMIT now" measures several codes in one rotation
record: setup
	KEPT="$(KEPT)" AGAINST="$(AGAINST)" OF="$(OF)" $(BIN)/python -m benchmarks.record $(PARAMS)

seeds: setup
	$(BIN)/python -m benchmarks.seeds

# Does health name each sickness by step 100? Half an hour of one core; finished runs are kept in .cache
detection: test-setup
	$(BIN)/python -m benchmarks.detection

# Does health keep quiet about some hundreds of trainings that are well? A quarter of an hour of one core
healthy: test-setup
	$(BIN)/python -m benchmarks.healthy

# Other tools for sick trainings on the same rows, in an environment of their own (2 GB); after `make detection`
TOOLS := torch-audit==0.3.0 torchdiag==0.1.0 traintools==0.6.2 training-doctor==0.1.0 trainpulse==0.4.0 trainspotter==0.2.6 \
	trainproof==0.22.0 traincheck==0.2.0 defaultplusplus==0.4.1
.cache/tools/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .cache/tools
	.cache/tools/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[lab,test]" $(TOOLS)
	@touch $@

tools: .cache/tools/installed
	.cache/tools/bin/python -m benchmarks.tools

# The mutation operators of one of them on three families of transformers
operators: .cache/tools/installed
	.cache/tools/bin/python -m benchmarks.operators

# What the watch costs the default run; on an idle machine
watch-cost: setup
	$(BIN)/python -m benchmarks.watch_cost

# The runs behind notebooks 03 and 04, hours of one core; finished ones are kept in .cache
studies: setup
	$(BIN)/python -m benchmarks.studies

# The twelve unlabelled runs of notebook 10, minutes of two cores; SEED=2 makes a ward that nobody has seen
ward: setup
	SEED="$(SEED)" $(BIN)/python -m benchmarks.ward

# The case's 1.5 B at its own size on a CPU: hours, 12 GB, then the cure, 23 GB of an idle machine; resumable
true-size: setup
	$(BIN)/python -m benchmarks.true_size case
	$(BIN)/python -m benchmarks.true_size cure

mutants: test-setup
	$(BIN)/python tests/mutants.py

# The checks alone, as a wheel, under the oldest and the newest torch that they claim: on Linux some 3 GB to download for each
health-wheel: test-setup
	$(BIN)/python tests/health_wheel.py

format: test-setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
