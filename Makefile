# make demo, make test: each sets up .venv by itself (Python >= 3.12, no GPU needed). make test draws the same
# examples each time; make test-all adds what takes long and draws new ones, by the SEED that pytest prints. make test-slow SHARE=6
# runs a sixth of those that take long.
PYTHON ?= $(shell command -v python3.12 || command -v python3)
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS ?= test,aot
SEED := $(or $(SEED),$(shell od -An -N4 -tu4 /dev/urandom | tr -d ' '))
SHARE ?= 1
CHECKPOINT ?= tests/data/qwen3-moe-tiny/bf16
export JAX_PLATFORMS ?= cpu

.PHONY: demo test test-all test-slow setup

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 12) else "Python 3.12 or newer is needed, found " + sys.version.split()[0] + "; name one with make PYTHON=...")'
	@echo "setting up $(VENV) for $(EXTRAS): some minutes, and silent"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	touch $@

demo: $(VENV)/.ready
	$(VENV)/bin/nvfp4jax demo $(CHECKPOINT)

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m "not slow" $(TESTS)

test-slow: $(VENV)/.ready
	NVFP4JAX_SEED=$(SEED) NVFP4JAX_SHARE=$(SHARE) $(VENV)/bin/python -m pytest -n 2 --dist worksteal -m slow $(TESTS)

test-all: $(VENV)/.ready
	NVFP4JAX_SEED=$(SEED) $(VENV)/bin/python -m pytest -n 2 --dist worksteal $(TESTS)
