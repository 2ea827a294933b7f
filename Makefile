# make demo [FULL=1]   models teach each other on real digits; writes demo_report/index.html
# make test            all tests but the slow ones;  make test-all: all of them
# make check           formatting, lint, types
#
# Everything is installed into .venv on the first call. Choose another build of torch with
#   make demo TORCH="torch torchvision --index-url URL_OF_YOUR_BUILD"
PYTHON ?= python3
TORCH ?= torch torchvision
VENV := .venv
RUN := OMP_NUM_THREADS=1 $(VENV)/bin/python

.PHONY: demo test test-all check clean

demo: $(VENV)/.demo
	$(RUN) -m classification.demo $(if $(FULL),--full)

test: $(VENV)/.dev
	$(RUN) -m pytest -m "not slow" -n 2

test-all: $(VENV)/.dev
	$(RUN) -m pytest -n 2

check: $(VENV)/.dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch setup.py
	$(VENV)/bin/python -m pip install --quiet -e ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch setup.py pyproject.toml
	$(VENV)/bin/python -m pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .demo demo_report
