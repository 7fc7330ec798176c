"""Peak memory of prepare_data.py on ordinary text and on text of new words only.

    python benchmarks/bench_prepare_data_memory.py [--tokens 100e6 300e6] [--num_workers N]

Runs the script as a user does, and adds up the anonymous memory of its processes twenty times a second (memory that
they share is counted once; pages that mirror a file, which the system can drop, are not counted). If memory is
bounded, it stays the same for ten times the tokens: the slope is the cost of a further million tokens. With `--tokens
100e6 1e9 3e9` this takes about an hour.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.corpora import write_documentation, write_new_words, write_zipfian
from benchmarks.measurements import ROOT, Report, build_parser
from modeling_gpt2_repro.core.devices import count_cores
from modeling_gpt2_repro.data.shards import load_manifest

POLL_SECONDS = 0.05
TEXTS = {"documentation": write_documentation, "zipfian": write_zipfian, "new words": write_new_words}


def measure_anonymous_memory(processes: list[psutil.Process]) -> int:
    """Return the anonymous memory of `processes` in bytes; shared pages count once."""
    total = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # the process has ended
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return total


def run(source: Path, target: Path, num_workers: int) -> tuple[int, float, int]:
    """Run prepare_data.py and return the tokens, the seconds and the peak of its memory in bytes."""
    flags = ["--files", source / "*.parquet", "--output_dir", target, "--num_workers", num_workers]
    command = [sys.executable, str(ROOT / "prepare_data.py"), *map(str, flags)]
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"}) as process:
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, measure_anonymous_memory([tree, *tree.children(recursive=True)]))
            time.sleep(POLL_SECONDS)
    if process.returncode != 0:
        raise RuntimeError(f"prepare_data.py exited with {process.returncode}")
    return load_manifest(target).read.tokens, time.perf_counter() - started, peak


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__, "prepare_data_memory")
    parser.add_argument("--tokens", type=float, nargs="+", default=[100e6, 300e6], help="approximate sizes")
    parser.add_argument("--texts", nargs="+", default=["zipfian", "new words"], choices=TEXTS)
    parser.add_argument("--num_workers", type=int, default=count_cores())
    options = parser.parse_args(argv)
    report = Report("prepare_data_memory", options)
    for text in options.texts:
        points = []
        for n_tokens in options.tokens:
            with tempfile.TemporaryDirectory() as name:
                source, target = Path(name) / "source", Path(name) / "shards"
                TEXTS[text](source, n_tokens)
                tokens, seconds, peak = run(source, target, options.num_workers)
            points.append((tokens / 1e6, peak / 1e6))
            subject = f"{n_tokens / 1e6:,g} M tokens"
            report.add(text, subject, peak / 1e9, "GB at peak", statistic="single run")
            report.add(text, subject, seconds, "s, imports included", statistic="single run")
        if len(points) > 1:
            slope = np.polyfit(*zip(*points, strict=True), 1)[0]
            report.add(text, "each further million tokens", slope, "MB", statistic="slope")
    report.write(options.output)


if __name__ == "__main__":
    main()
