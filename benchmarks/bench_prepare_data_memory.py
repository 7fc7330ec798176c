"""Peak memory of prepare_data.py, on text like any other and on text made of ever new words.

    python benchmarks/bench_prepare_data_memory.py [--tokens 100e6 1e9] [--num_workers N]

Runs the script as people do and adds up, twenty times a second, the anonymous memory of its processes (what is shared
between them counted once; pages that mirror a file, which the system drops when it needs to, not counted). Memory that
is bounded by design is the same for ten times the tokens: the slope says how much a further million costs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_prepare_data import BYTES_PER_TOKEN, SCHEMA, list_documents, write_corpus

from modeling_gpt2_repro.core.devices import count_cores
from modeling_gpt2_repro.data.shards import load_manifest

SCRIPT = Path(__file__).resolve().parent.parent / "prepare_data.py"
POLL_SECONDS = 0.05
# A random word of seven letters and its space are about this many GPT-2 tokens.
TOKENS_PER_NEW_WORD = 4.5
NEW_WORDS_PER_DOCUMENT = 250


def write_new_words(path: Path, n_tokens: int) -> None:
    """Write documents of random words of seven letters, hardly any of which comes twice."""
    generator = np.random.default_rng(0)
    n_documents = int(n_tokens / TOKENS_PER_NEW_WORD / NEW_WORDS_PER_DOCUMENT)
    with pa.parquet.ParquetWriter(path, SCHEMA) as writer:
        for start in range(0, n_documents, 1000):
            n_rows = min(1000, n_documents - start)
            letters = generator.integers(97, 123, (n_rows, NEW_WORDS_PER_DOCUMENT, 8), dtype=np.uint8)
            letters[:, :, 0] = 32
            rows = [{"text": document.tobytes().decode()} for document in letters]
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))


def measure_anonymous_memory(processes: list[psutil.Process]) -> int:
    """Return the anonymous memory of `processes` in bytes, shared pages counted by their share."""
    total = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return total


def run(path: Path, folder: Path, num_workers: int) -> tuple[int, float, int]:
    """Run prepare_data.py and return the tokens, the seconds and the peak of its memory in bytes."""
    flags = ["--files", path, "--output_dir", folder / "shards", "--num_workers", num_workers, "--overwrite"]
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"}) as process:
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, measure_anonymous_memory([tree, *tree.children(recursive=True)]))
            time.sleep(POLL_SECONDS)
    assert process.returncode == 0
    return load_manifest(folder / "shards").read.tokens, time.perf_counter() - started, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, nargs="+", default=[100e6, 1e9], help="sizes of the corpus, about")
    parser.add_argument("--num_workers", type=int, default=count_cores())
    arguments = parser.parse_args()
    documents = list_documents()
    texts = {
        "documentation": lambda path, n: write_corpus(path, int(n * BYTES_PER_TOKEN), documents),
        "ever new words": lambda path, n: write_new_words(path, int(n)),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for text, write in texts.items():
            points = []
            for n_tokens in arguments.tokens:
                write(folder / "corpus.parquet", n_tokens)
                tokens, seconds, peak = run(folder / "corpus.parquet", folder, arguments.num_workers)
                points.append((tokens / 1e6, peak / 1e6))
                print(f"{text}: {tokens:,} tokens, peak {peak / 1e9:.2f} GB, {seconds:.1f} s with imports", flush=True)
            if len(points) > 1:
                slope = np.polyfit(*zip(*points, strict=True), 1)[0]
                print(f"{text}: {slope:.3f} MB for each further million tokens", flush=True)


if __name__ == "__main__":
    main()
