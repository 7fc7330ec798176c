"""The cost of publishing during training: checkpoints of GPT-2 124M, to a stand-in for the Hub on this machine.

    python benchmarks/bench_publishing.py [--model_size 124M] [--checkpoints 3]

Submitting a checkpoint is timed alone, because training stands still for it. Then updates of a small model are timed
while nothing is uploaded, and while checkpoints are. On a CPU the uploads share the cores with training, as does the
stand-in, which receives the files and computes their checksums. A GPU's steps would share no core with them.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
HUB = """
import sys
from loopback_hub import LoopbackHub, User
with LoopbackHub() as hub:
    hub.users = {"hf_benchmark": User("me")}
    print(hub.url, flush=True)
    sys.stdin.read()
"""


def time_updates(update: Callable[[], None], is_over: Callable[[int], bool]) -> list[float]:
    """Return the milliseconds of each update until `is_over(number of updates)`."""
    milliseconds: list[float] = []
    while not is_over(len(milliseconds)):
        started = time.perf_counter()
        update()
        milliseconds.append(1e3 * (time.perf_counter() - started))
    return milliseconds


def main() -> None:
    # Only now, because the Hub's address is read on import.
    import torch
    from transformers.utils import logging as transformers_logging

    from benchmarks.measurements import SHAPES, Report, build_parser
    from modeling_gpt2_repro import GPT2ReproConfig, GPT2ReproForCausalLM
    from modeling_gpt2_repro.core.arguments import write_config
    from modeling_gpt2_repro.model.folder import save_model
    from modeling_gpt2_repro.publishing.uploader import Uploader
    from modeling_gpt2_repro.training.config import TrainingConfig
    from modeling_gpt2_repro.training.optim import build_adamw
    from modeling_gpt2_repro.training.run_folder import RunFolder

    transformers_logging.disable_progress_bar()
    parser = build_parser(__doc__, "publishing")
    parser.add_argument("--model_size", default="124M", choices=SHAPES)
    parser.add_argument("--checkpoints", type=int, default=3)
    options = parser.parse_args()
    report, part = Report("publishing", options), f"checkpoints of {options.model_size}"
    no_ids = {"bos_token_id": None, "eos_token_id": None}
    small = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=1000, **no_ids))
    optimizer = build_adamw(small, 6e-4, 0.1, (0.9, 0.95))
    ids = torch.randint(0, 1000, (2, 129))

    def update() -> None:
        small(input_ids=ids[:, :-1], shift_labels=ids[:, 1:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as name:
        run_folder = RunFolder(Path(name) / "bench")
        config = TrainingConfig(run_name="bench", push_to_hub=True, data_dir=str(run_folder))
        run_folder.path.mkdir()
        write_config(config, run_folder.config)
        steps = range(1, options.checkpoints + 1)
        run_folder.metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))
        checkpoints = [run_folder.checkpoints / f"step_{step:07d}" for step in steps]
        for seed, checkpoint in enumerate(checkpoints):
            torch.manual_seed(seed)
            save_model(checkpoint, GPT2ReproForCausalLM(GPT2ReproConfig(**SHAPES[options.model_size])), None)
        publisher = Uploader(run_folder, config, True, lambda text: print(f"  {text}", flush=True))
        publisher.check(is_resumed=False)
        time_updates(update, lambda number: number >= 20)
        alone = time_updates(update, lambda number: number >= 200)
        publisher.start(None)
        waiting = []
        started = time.perf_counter()
        for checkpoint in checkpoints:
            submitted = time.perf_counter()
            publisher.submit(checkpoint)
            waiting.append(1e3 * (time.perf_counter() - submitted))
            shutil.rmtree(checkpoint)  # as a run prunes old ones
        beside = time_updates(update, lambda number: not any(run_folder.hub_upload.glob("step_*")))
        report.add(part, f"uploading {len(checkpoints)}", time.perf_counter() - started, "s", statistic="single run")
        report.add_median(part, "submitting one (training stands still)", waiting, "ms")
        part = "updates of a small model"
        for name, milliseconds in (("nothing uploaded", alone), ("checkpoints uploaded", beside)):
            report.add_median(part, name, milliseconds, "ms")
            report.add(part, name, sorted(milliseconds)[int(0.99 * (len(milliseconds) - 1))], "ms, 99th percentile")
        report.compare(part, "checkpoints uploaded", "nothing uploaded")
    report.write(options.output)


if __name__ == "__main__":
    command = [sys.executable, "-c", HUB]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "tests")}
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server,
        tempfile.TemporaryDirectory() as home,
    ):
        os.environ |= {"HF_ENDPOINT": server.stdout.readline().strip(), "HF_HOME": home, "HF_TOKEN": "hf_benchmark"}
        os.environ |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        main()
        server.stdin.close()
