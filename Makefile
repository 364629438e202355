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
    tests/backbones/test_weight_files.py tests/backbones/test_tokenizers.py tests/saved/test_prompts.py \
    tests/learners/test_coop.py tests/diffusion/test_custom_code.py tests/cli/test_saved.py

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

# The lowest versions that pyproject.toml allows of what is named there, in an environment of their own. Without Gradio,
# which would not let the lowest transformers and huggingface_hub in (the marker is never true).
test-lowest:
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install uv
	echo "gradio; python_version < '3'" > $(LOWEST)/without.txt
	$(LOWEST)/bin/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct --overrides $(LOWEST)/without.txt -e '.[dev]'
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(LOWEST_TESTS)

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
