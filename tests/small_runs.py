"""Training runs that are small enough for tests, and readers of their metrics."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY

import train
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE

N_STEPS = 12
SMALL = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "sequence_length": 32,
    "tokens_per_step": 256,
    "max_steps": N_STEPS,
    "warmup_tokens": 512,
    "learning_rate": 2e-2,
    "mixed_precision": "no",
    "compile": "off",
    "eval_every": 6,
    "eval_tokens": 512,
    "hellaswag_every": 6,
    "hellaswag_file": SAMPLE_FILE,
    "hellaswag_limit": 3,
    "sample_every": 6,
    "sample_tokens": 16,
    "save_every": 6,
    "keep_checkpoints": 0,
    "report_to": "none",
}


def flags(data_dir: Path, output_dir: Path, run_name: str = "run", **changes) -> list[str]:
    settings = {**SMALL, "data_dir": data_dir, "output_dir": output_dir, "run_name": run_name, **changes}
    return [f"--{name}={value}" for name, value in settings.items()]


def run_training(data_dir: Path, output_dir: Path, run_name: str = "run", **changes) -> Path:
    assert train.main(flags(data_dir, output_dir, run_name, **changes)) == 0
    return output_dir / run_name


def read_series(run_folder: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def read_losses(run_folder: Path) -> dict[int, float]:
    return read_series(run_folder, "train/loss")


def list_launch_command(n_processes: int, argv: list[str]) -> list[str]:
    """Return the command that runs train.py in separate processes on the CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={n_processes}"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    return [*command, *(["--multi_gpu"] if n_processes > 1 else []), str(REPOSITORY / "train.py"), *argv]


def launch(n_processes: int, argv: list[str]) -> subprocess.CompletedProcess:
    """Run train.py in several separate processes until it ends."""
    return subprocess.run(list_launch_command(n_processes, argv), capture_output=True, text=True)
