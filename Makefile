# make install   a virtual environment in .venv with the tested versions; nothing to do the second time
# make demo      prepares data, trains the tiny GPT and shows the result
# make demo-t5   the same with the tiny T5, which fills in masked spans
# make demo-clip draws captioned shapes, trains the tiny CLIP, classifies combinations outside of its training set
# make gpu-check  on one GPU: what must agree there, then the speed of two models, in about eight minutes
# make test      what CI runs     make quick   the fast part of it     make lint   make docs
# make faults    signals, lost nodes, killed launchers, hostile values: ARGS="--rows F3,F8 --trials 2 --seed 7"
#
# Without a GPU, `pip install torch` may still bring several GB of CUDA packages. To stay on the CPU build, name the index
# that holds it: make install TORCH_INDEX_URL=... (the address is in PyTorch's installation guide).

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: install demo demo-t5 demo-clip gpu-check test quick faults lint docs

install: $(STAMP)

$(STAMP): setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX_URL),$(BIN)/pip install -c constraints.txt --index-url $(TORCH_INDEX_URL) torch)
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/trainyard demo

demo-t5: install
	$(BIN)/trainyard demo t5

demo-clip: install
	$(BIN)/trainyard demo clip

gpu-check: install
	$(BIN)/python benchmarks/gpu_check.py

test:
	.ci/run

quick: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow and not gpu and not slurm"

faults: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: install
	$(BIN)/python -m pretrain.config.reference > docs/config.md
