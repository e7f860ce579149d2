## make demo       text from the embedded model; the first call sets everything up
## make test       the tests, on the CPU, in up to four processes
## make test-gpu   the tests that need an NVIDIA GPU
## make lint       format, lint and types;  `make format` repairs the first two
## make clean      removes the environment and what was built
##
## Everything is installed into .venv in this folder, which git ignores. To choose otherwise:
##   make PYTHON=python3.12 VENV=.venv-3.12 test    another Python, in an environment of its own
##   make VENV=none demo                            python3 as it is; nothing is installed
##
## Tests marked `oracle` compare with PyTorch, which is installed for Python 3.11 alone; elsewhere they
## are skipped unless it is there already.

VENV ?= .venv
PYTHON ?=
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifeq ($(VENV),none)
run := PYTHONPATH="$(CURDIR)" $(or $(PYTHON),python3)
else
run := $(VENV)/bin/python
ready := $(VENV)/.ready
ready_for_tests := $(VENV)/.ready-for-tests
endif

# Sets $python to the first one that is new enough and able to make an environment.
define find_python
for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14 \
    "$$HOME"/.pyenv/versions/*/bin/python3); do \
  "$$python" -c 'import ensurepip, venv, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
    && break; \
  python=; \
done; \
if [ -z "$$python" ]; then \
  echo 'No Python >= 3.11 with the venv module was found. Install one (on Debian or Ubuntu:' \
    'apt install python3 python3-venv), or name one: make PYTHON=/path/to/python3.12 ...' >&2; \
  exit 1; \
fi
endef

# Sets $extra to the CUDA that the NVIDIA driver can run; to nothing where there is no driver.
define choose_extra
driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null \
  | head -n 1 | cut -d . -f 1); \
case "$$driver" in \
  '' | *[!0-9]*) extra= ;; \
  *) if [ "$$driver" -ge 580 ]; then extra='[cuda13]'; else extra='[cuda12]'; fi ;; \
esac
endef

.PHONY: help demo test test-gpu lint format clean

help:
	@sed -n 's/^## \{0,1\}//p' Makefile

demo: $(ready)
	@$(run) examples/demo.py

test: $(ready_for_tests)
	@$(run) -m pytest $(or $(PYTEST_ARGS),-n auto --maxprocesses 4 --dist loadfile)

test-gpu: $(ready_for_tests)
	@JAXENGINE_TEST_GPU=1 $(run) -m pytest -m gpu $(PYTEST_ARGS)

lint: $(ready_for_tests)
	@$(run) -m ruff format --check
	@$(run) -m ruff check
	@$(run) -m pyright --pythonpath "$$($(run) -c 'import sys; print(sys.executable)')"

format: $(ready_for_tests)
	@$(run) -m ruff format
	@$(run) -m ruff check --fix

clean:
	rm -rf .venv .venv-* build dist jaxengine.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/.ready: pyproject.toml
	@$(find_python); \
	if [ ! -x $(VENV)/bin/python ]; then "$$python" -m venv $(VENV); fi
	@$(choose_extra); \
	echo "Installing jaxengine$$extra for $$($(run) -V) into $(VENV); this takes minutes, once." >&2; \
	$(run) -m pip install -qq --editable ".$$extra"
	@touch $@

$(VENV)/.ready-for-tests: $(VENV)/.ready
	@echo 'Installing what the tests need.' >&2
	@$(run) -m pip install -qq --editable '.[test]'
	@$(run) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || exit 0; $(run) -m pip install -qq '$(TORCH)' \
	  || echo '$(TORCH) cannot be installed here: the tests against it will be skipped.' >&2
	@touch $@
