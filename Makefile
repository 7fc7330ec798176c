# Most targets use .venv, which `install` creates. On a CPU-only machine, point pip at PyTorch's CPU index:
# make install PIP_ARGS="--extra-index-url URL"
# uv installs the same versions faster: make install PIP="uv pip" PIP_ARGS="--torch-backend cpu"
PYTHON ?= python3
PIP ?= $(BIN)/pip
PIP_ARGS ?=
BIN := .venv/bin
INSTALL = VIRTUAL_ENV="$(CURDIR)/.venv" $(PIP) install --constraint constraints.txt $(PIP_ARGS)
# Three also pay off on two cores, as tests wait for disks, servers and processes. A worker takes whole files;
# tests/conftest.py puts those with many heavy tests first.
TEST_WORKERS ?= 3
TEST = $(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

SAMPLE_ITEMS := modeling_gpt2_repro/evaluation/hellaswag_sample.jsonl

.PHONY: install demo next-steps test test-quick test-slow test-gpu quality bench fuzz audit ecosystem

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[dev]'
	@touch $@

# The demo works offline and always runs on the CPU.
demo: export HF_HUB_OFFLINE := 1
demo: export ACCELERATE_USE_CPU := true
demo: export TOKENIZERS_PARALLELISM := false
demo: install
	$(BIN)/python prepare_data.py --config configs/demo_data.yaml
	@rm -f runs/demo/hellaswag_sample.json # of an earlier demo
	$(BIN)/accelerate launch --config_file accelerate_config.yaml \
		--num_processes 1 --main_process_port 0 \
		train.py --config configs/demo.yaml --resume_from_checkpoint never
	@# A new process loads the model with AutoModelForCausalLM; the summary shows the scores that it writes.
	$(BIN)/python eval_hellaswag.py --model runs/demo/final \
		--data_file $(SAMPLE_ITEMS) \
		--output runs/demo/hellaswag_sample.json >/dev/null
	$(BIN)/python -m modeling_gpt2_repro summary runs/demo
	@$(MAKE) --silent next-steps

next-steps:
	@printf '%s\n' '' '# Next: activate the environment that make installed' \
		'source .venv/bin/activate' \
		'# Train on your own text' \
		'python prepare_data.py --files "books/*.txt" --output_dir data/books' \
		'python train.py --config configs/laptop.yaml --data_dir data/books \' '    --run_name books' \
		'# Continue your own prompt' \
		'python -m modeling_gpt2_repro sample --model runs/demo/final \' '    --prompt "The function returns"' \
		'# See what the full run takes' \
		'python train.py --config configs/gpt2_124M.yaml --plan'

# Containers often set this variable, and then each of the tests' processes compiles the package again.
test test-quick test-slow: export PYTHONDONTWRITEBYTECODE :=

test: install
	$(TEST) -m "not slow"

# Leaves out the tests marked as heavy (HEAVY_FIXTURES in tests/conftest.py): all training runs, all processes, compiled
# models, and generated bad input. What is left covers every folder of the package.
# Two workers: these tests rarely wait, and each worker spends seconds on imports.
test-quick: TEST_WORKERS = 2
test-quick: install
	$(TEST) -m "not slow and not heavy" --durations=5

test-slow: install
	$(TEST) -m slow -rs
	GPU_TESTS_DEVICE=cpu $(BIN)/pytest tests/gpu

# Tests that need a GPU. Installs nothing: set PYTHON to an interpreter whose torch sees the device. Without a GPU,
# GPU_TESTS_DEVICE=cpu runs the same tests at toy size, as `make test-slow` does.
test-gpu:
	$(PYTHON) -m pytest -rs --durations=10 tests/gpu

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

# Runs all benchmarks sequentially (about 50 minutes on two cores) and writes docs/benchmarks.md. A failing benchmark
# does not stop the others. HellaSwag's items are read from .gpu/hellaswag_val.jsonl.gz if it exists.
bench: install
	$(INSTALL) --editable '.[dev,bench]'
	failed=; for script in benchmarks/bench_*.py; do \
		echo "== $$script"; $(BIN)/python $$script || failed="$$failed $$script"; \
	done; \
	$(BIN)/python benchmarks/write_page.py && test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# Random bad input, with FUZZ_FACTOR times as many examples as in `make test`. Failing examples are saved in .hypothesis
# and tried first in the next run. To repeat a whole run, pass the seed that it printed: FUZZ_ARGS="--hypothesis-seed=N".
# To repeat a single failure, put the printed `@reproduce_failure(...)` above its test.
FUZZ_FACTOR ?= 20
FUZZ_ARGS ?=
fuzz: install
	FUZZ_FACTOR=$(FUZZ_FACTOR) $(BIN)/pytest -n $(TEST_WORKERS) tests/bad_input $(FUZZ_ARGS)

# Checks all pinned versions against PyPI's database of known vulnerabilities, which needs a network. With --strict, a
# package that could not be checked is a failure.
audit: install
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

# Opens a trained checkpoint with third-party tools, which only this target installs. The test names give the versions
# that they passed with.
ecosystem: install
	$(INSTALL) --editable '.[dev,ecosystem]'
	$(BIN)/pytest -vv -rs tests/ecosystem
