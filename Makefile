# The first `make demo` or `make test` sets up the environment; later ones reuse it.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
ARGS ?=
KVB_BUILD_EXT ?= auto

export KVB_BUILD_EXT
export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
SETUP := $(VENV)/.kvb-$(shell echo '$(TORCH) $(TORCH_INDEX) $(KVB_BUILD_EXT)' | cksum | cut -d ' ' -f 1)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) TORCH_INDEX=$(TORCH_INDEX) KVB_BUILD_EXT=$(KVB_BUILD_EXT)"

demo: $(VENV)/.kvb-demo ## run the demo; its options go in ARGS="..."
	@$(BIN)/python -m kvb demo $(ARGS)

test: lint ## run the linters and the tests
	@$(BIN)/pytest -q

test-all: test ## the same, then the slow tests
	@$(BIN)/pytest -q -m slow -s || [ $$? -eq 5 ]  # 5: there is none

lint: $(VENV)/.kvb-test ## check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean: ## remove what builds and tests leave behind, but not the environment
	@rm -rf build dist demo_out *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find kvb kernels benchmarks tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	@rm -f $(VENV)/.kvb-*

# The environment: torch comes first, in the build asked for, so that nothing later pulls in another.
# Its stamp is named after the settings, and is laid down only when all of it is there.
$(SETUP):
	@$(PIP) --version >/dev/null 2>&1 \
		|| { echo "Creating $(VENV)"; $(PYTHON) -m venv $(VENV); } \
		|| virtualenv -q -p $(PYTHON) $(VENV) \
		|| { echo >&2; \
			echo "Cannot create $(VENV) with $(PYTHON). Get one of these, then run make again:" >&2; \
			echo "  venv:        apt install python3-venv   (or your system's package of that name)" >&2; \
			echo "  virtualenv:  pipx install virtualenv" >&2; \
			exit 1; }
	@rm -f $(VENV)/.kvb-*
	@echo "Installing $(TORCH)"
	@$(PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	@$(PIP) install -q 'setuptools>=77' wheel
	@touch $@

$(VENV)/.kvb-demo $(VENV)/.kvb-test: $(VENV)/.kvb-%: $(SETUP) pyproject.toml setup.py Makefile
	@echo "Installing kvb[$*]"
	@$(PIP) install -q --no-build-isolation -e '.[$*]'
	@touch $@
