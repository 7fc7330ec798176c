# Everything runs from .venv, which the first target makes. A CPU-only machine can point pip at PyTorch's CPU index:
# make install PIP_ARGS="--extra-index-url URL"
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
TEST_WORKERS ?= 2

SAMPLE_ITEMS := modeling_gpt2_repro/evaluation/hellaswag_sample.jsonl
# The demo asks nothing of the network, computes on the CPU whatever else there is, and reports to no tracker.
DEMO_ENVIRONMENT := HF_HUB_OFFLINE=1 ACCELERATE_USE_CPU=true TOKENIZERS_PARALLELISM=false

.PHONY: install demo test test-slow test-gpu quality bench fuzz audit ecosystem

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt $(PIP_ARGS) --editable '.[dev]'
	@touch $@

demo: install
	$(DEMO_ENVIRONMENT) $(BIN)/python prepare_data.py --config configs/demo_data.yaml
	$(DEMO_ENVIRONMENT) $(BIN)/accelerate launch --config_file accelerate_config.yaml --num_processes 1 \
		train.py --config configs/demo.yaml --resume_from_checkpoint never
	$(DEMO_ENVIRONMENT) $(BIN)/python eval_hellaswag.py --model runs/demo/final --data_file $(SAMPLE_ITEMS) \
		--output runs/demo/hellaswag_sample.json
	@echo "A fresh process opens runs/demo/final with AutoModelForCausalLM and writes:"
	$(DEMO_ENVIRONMENT) $(BIN)/python -m modeling_gpt2_repro sample --model runs/demo/final --n_samples 2
	$(BIN)/python -m modeling_gpt2_repro summary runs/demo

test: install
	$(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile -m "not slow"

test-slow: install
	$(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile -m slow -rs
	GPU_TESTS_DEVICE=cpu $(BIN)/pytest tests/gpu

# What a GPU alone can show. Nothing is installed: it takes the PYTHON that it is given, in which torch sees the device.
# GPU_TESTS_DEVICE=cpu tries the same tests out at toy size, where there is none, as `make test-slow` does.
test-gpu:
	$(PYTHON) -m pytest -rs --durations=10 tests/gpu

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Runs every benchmark alone, one after the other, in about 45 minutes on two cores, and writes docs/benchmarks.md. A
# benchmark that fails does not stop the others. HellaSwag's items are read from .gpu/hellaswag_val.jsonl.gz if it exists.
bench: install
	$(BIN)/pip install --constraint constraints.txt $(PIP_ARGS) --editable '.[dev,bench]'
	failed=; for script in benchmarks/bench_*.py; do \
		echo "== $$script"; $(BIN)/python $$script || failed="$$failed $$script"; \
	done; \
	$(BIN)/python benchmarks/write_page.py && test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# Bad input by chance, and FUZZ_FACTOR times as much of it as `make test` has. What fails is kept in .hypothesis and
# comes first when this runs again; FUZZ_ARGS="--hypothesis-seed=N" repeats a whole run by the seed that it printed, and
# the line `@reproduce_failure(...)` that is printed with a failure, put above the test, that one case.
FUZZ_FACTOR ?= 20
FUZZ_ARGS ?=
fuzz: install
	FUZZ_FACTOR=$(FUZZ_FACTOR) $(BIN)/pytest -n $(TEST_WORKERS) tests/bad_input $(FUZZ_ARGS)

# Asks PyPI's database of known vulnerabilities about every pinned version, and so needs a network. It is strict: what
# the database was not asked about, because it is out of reach, is a failure and not a pass.
audit: install
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

# A trained checkpoint in the hands of other people's tools, which are installed for this alone. The names of the tests
# say with which versions they passed.
ecosystem: install
	$(BIN)/pip install --constraint constraints.txt $(PIP_ARGS) --editable '.[dev,ecosystem]'
	$(BIN)/pytest -vv -rs tests/ecosystem
