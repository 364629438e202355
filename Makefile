# Every target sets itself up: a machine with Python >= 3.10 and make is enough.
#   make quickstart    install, train CoOp on the embedded default, print where the report lies
#   make test          install, run the default test suite
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11 python3.10 python,\
    $(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $(p))))
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOWEST := .venv-lowest
LOWEST_TESTS := tests/backbones/test_tiny.py tests/backbones/test_openclip.py tests/backbones/test_weight_facts.py \
    tests/backbones/test_weight_files.py tests/saved/test_prompts.py tests/learners/test_coop.py tests/cli/test_saved.py \
    tests/training/test_trainer.py tests/experiments/test_runner.py
LOWEST_TESTS_OF_EXTRAS := tests/backbones/test_tokenizers.py tests/diffusion/test_custom_code.py \
    tests/classification/test_name_list.py tests/data/test_objects.py tests/experiments/test_search.py \
    tests/experiments/test_slurm.py tests/saved/test_export.py tests/shards/test_shards.py tests/text_search/test_chat.py
LOWEST_SLOW_TESTS := tests/training/test_trackers.py

.PHONY: quickstart test test-slow test-slurm test-campaign test-lowest lint format docs install clean
.DEFAULT_GOAL := test

quickstart: $(INSTALLED)
	$(BIN)/vlprompt run quickstart.yaml

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --durations 20

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n auto --maxprocesses 4 --dist loadfile --durations 40 || [ $$? -eq 5 ]  # 5: no test is marked slow

# Inside tests/slurm_node.sh, which starts Slurm's daemons.
test-slurm: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/experiments/test_slurm.py

test-campaign: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m campaign -n auto --maxprocesses 4 --dist loadfile

# The lowest versions that pyproject.toml allows of what is named there, in an environment of their own: first of what is
# always needed, then of the extras, some of which need newer ones of the same. Without Gradio, which would not let the
# lowest transformers and huggingface_hub in (the marker is never true).
test-lowest:
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install uv
	$(LOWEST)/bin/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct -e . \
	    'hypothesis>=6.100' 'packaging>=24.0' 'pytest>=8.0' 'pytest-xdist>=3.6'
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(LOWEST_TESTS)
	echo "gradio; python_version < '3'" > $(LOWEST)/without.txt
	$(LOWEST)/bin/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct --overrides $(LOWEST)/without.txt -e '.[dev]'
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(LOWEST_TESTS_OF_EXTRAS)
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -m "slow or not slow" $(LOWEST_SLOW_TESTS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in build/site.
docs: $(INSTALLED)
	$(BIN)/python -m sphinx -W --keep-going docs build/site

install: $(INSTALLED)

# The stamp is written last, so an installation that was interrupted is done again.
$(INSTALLED): pyproject.toml setup.py requirements-ci.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.10 found. Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || $(PYTHON) -m virtualenv $(VENV) || { rm -rf $(VENV); \
	    echo "$(PYTHON) cannot create a virtual environment. On Debian or Ubuntu: apt install python3-venv;" \
	    "elsewhere: $(PYTHON) -m pip install --user virtualenv; or name another Python: make PYTHON=..." >&2; exit 2; }
	$(BIN)/python -m pip install -c requirements-ci.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(LOWEST) build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
