# make demo    the whole of it on this machine: sample, distill, evaluate, report, publish to the embedded Hub
# make test    everything that CI runs (real vLLM, real small model)
# make quick   the inner loop of development: no vLLM, no training, no Hub
# make docs    the documentation as a site in docs/_build/html; warnings are errors
# make sbom    what is installed, as CycloneDX in sbom.json
# make fuzz    ten minutes of damaged recipes, repos and requests each
# make long    what takes longer: kills, soak, simulation
# Each does its own set-up in .venv, from nothing, and is quick the second time.

VENV := .venv
# The GPU lock where the driver shows a CUDA device, the CPU lock elsewhere.
LOCK ?= requirements/$(if $(shell nvidia-smi -L 2>/dev/null | grep GPU),gpu,cpu).txt

# Tests start hundreds of processes: each would compile all modules anew where the environment says so.
export PYTHONDONTWRITEBYTECODE :=

# Two test processes with half of the cores each; the first one gets the tests with a real vLLM.
SIDE_BY_SIDE := -n 2 --no-loadscope-reorder

.PHONY: demo test quick long fuzz lint docs sbom setup
demo: setup
	$(VENV)/bin/dsc run quickstart

test: setup lint
	$(VENV)/bin/python -m pytest -m "not long" $(SIDE_BY_SIDE)

# What needs a model, a server of a model, a Hub or the whole command line is left to `make test`.
QUICK := chain config data evaluation report runs/test_run.py runs/test_row_index.py runs/test_metrics_schema.py sampling system \
  test_acceptance.py test_errors.py test_layers.py test_stats.py

quick: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest -q $(SIDE_BY_SIDE) -m "not long and not engine" $(addprefix tests/,$(QUICK))

long: setup
	$(VENV)/bin/python -m pytest -m long

fuzz: setup
	$(VENV)/bin/python -m pytest -s -m long tests/test_fuzz.py

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy -p dsc_hub

docs: setup
	$(VENV)/bin/python docs/generate.py
	$(VENV)/bin/sphinx-build -W --keep-going -q docs docs/_build/html

sbom: setup
	$(VENV)/bin/cyclonedx-py environment $(VENV) --no-validate --output-reproducible --output-file sbom.json

setup:
	@requirements/install.sh $(LOCK) $(VENV)
