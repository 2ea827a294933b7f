# make demo [TASK=segmentation|saliency] [FULL=1]   models teach each other on real digits, on
#                           scenes or on videos composed of them; writes into demo_report/
# make test                 all tests but the slow ones;  make test-all: all of them
# make check                formatting, lint, types
# make pictures EXPERIMENT=REPORT SCOUTING=REPORT   take README's pictures of two report.html anew,
#                           with the Chromium or Chrome of this machine
# make setup-segmentation   Detectron2 and what segmentation/ needs (part of make test and of
#                           make demo TASK=segmentation)
#
# Everything is installed into .venv on the first call. Choose another build of torch with
#   make demo TORCH="torch torchvision --index-url URL_OF_YOUR_BUILD"
PYTHON ?= python3
TORCH ?= torch torchvision
TASK ?= classification
VENV := .venv
RUN := OMP_NUM_THREADS=1 $(VENV)/bin/python

.PHONY: demo test test-all check clean pictures setup-segmentation

# exec: a shell in between would not hand on the SIGTERM that make hands on
demo: $(VENV)/.demo $(if $(filter segmentation,$(TASK)),$(VENV)/.detectron2)
	OMP_NUM_THREADS=1 exec $(VENV)/bin/python -m $(TASK).demo $(if $(FULL),--full)

test: $(VENV)/.dev $(VENV)/.original
	$(RUN) -m pytest -m "not slow" -n 2

test-all: $(VENV)/.dev $(VENV)/.original
	$(RUN) -m pytest -n 2

check: $(VENV)/.dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

pictures: $(VENV)/.dev
	$(RUN) -m benchmarks.pictures experiment=$(EXPERIMENT) scouting=$(SCOUTING)

setup-segmentation: $(VENV)/.detectron2

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

# The wheel is tagged for Python 3.10; its Python part runs on any. Not asked for where there is one.
$(VENV)/.detectron2: $(VENV)/.torch setup.py segmentation/detectron2.txt
	$(VENV)/bin/python -m pip install --quiet -e ".[segmentation]"
	$(VENV)/bin/python -c "import detectron2" 2>/dev/null || $(VENV)/bin/python -m pip install \
		--quiet --no-deps --require-hashes --only-binary=:all: --python-version 3.10 \
		--target "$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		--requirement segmentation/detectron2.txt
	touch $@

# The original Mask2Former, for the tests to compare with; it is not complete as released.
$(VENV)/.original: $(VENV)/.detectron2
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation "maskformer2==0.1"
	touch $@

clean:
	rm -rf $(VENV) .demo demo_report
