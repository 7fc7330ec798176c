"""Tokens a second of prepare_data.py beside build-nanogpt's method, a process pool of tiktoken workers.

    python benchmarks/bench_prepare_data.py [--tokens 10e6 100e6] [--rounds 5] [--num_workers N]

For each size both read the same parquet file, of FineWeb-Edu's shape, and write uint16 shards to a temporary folder;
they take turns, and the medians are compared. Everything from the file to the finished shards is timed, start-up
included; ours also shuffles, checks and synchronises its shards to disk. What is not timed: the imports of both, and
the tokenizer of the baseline, whose reader is leaner than the original's too (texts alone instead of whole rows). The
text is the documentation of the installed packages, over and over with its paragraphs in another order, so that no two
documents are equal; it has no more distinct words than once, which a cache of words profits from.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prepare_data
from modeling_gpt2_repro.core.devices import count_cores
from modeling_gpt2_repro.data.shards import load_manifest
from modeling_gpt2_repro.data.sources.corpus import build_docstring_corpus
from modeling_gpt2_repro.data.tokenizer import load_tokenizer

# tiktoken_ext/openai_public.py, gpt2
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
SHARD_SIZE = 100_000_000
BYTES_PER_TOKEN = 3.9
ROWS_PER_GROUP = 1000
SCHEMA = pa.schema({"text": pa.string(), "id": pa.string(), "url": pa.string(), "language_score": pa.float64()})


def build_tiktoken(folder: Path) -> tiktoken.Encoding:
    """Build tiktoken's GPT-2 encoding from the tokenizer's own files, so that no download is needed."""
    tokenizer = load_tokenizer()
    definition = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "encoder.json").write_text(json.dumps(definition["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in definition["merges"]]
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    return tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )


def tokenize(text: str) -> np.ndarray:
    """Encode one document in a worker."""
    return np.array([50256, *encoding.encode_ordinary(text)], dtype=np.uint16)


def iterate_texts(path: Path) -> Iterator[str]:
    """Yield the documents of a parquet file, one at a time."""
    for batch in pa.parquet.ParquetFile(path).iter_batches(columns=["text"]):
        yield from batch.column(0).to_pylist()


def list_documents() -> list[list[str]]:
    """Return the built-in corpus as documents of paragraphs."""
    batches = (batch for task in build_docstring_corpus().tasks for batch in task.read_batches())
    return [text.split("\n\n") for batch in batches for text in batch.to_pylist()]


def write_corpus(path: Path, n_bytes: int, documents: list[list[str]]) -> None:
    """Write at least `n_bytes` of text as parquet, with an id and an address of its own for each document."""
    generator = np.random.default_rng(0)
    written, rows = 0, []
    with pa.parquet.ParquetWriter(path, SCHEMA) as writer:
        while written < n_bytes:
            for paragraphs in documents:
                text = "\n\n".join(paragraphs[index] for index in generator.permutation(len(paragraphs)))
                written += len(text.encode())
                name = generator.bytes(16).hex()
                rows.append({"text": text, "id": name, "url": f"https://example.org/{name}", "language_score": 1.0})
                if len(rows) == ROWS_PER_GROUP:
                    writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                    rows = []
                    if written >= n_bytes:
                        return


def run_baseline(path: Path, folder: Path, num_workers: int) -> tuple[float, int]:
    """Return seconds and tokens of the process pool, which keeps the source order."""
    started = time.perf_counter()
    shard = np.empty(SHARD_SIZE, dtype=np.uint16)
    filled = shards = tokens = 0
    with multiprocessing.get_context("fork").Pool(num_workers) as pool:
        for ids in pool.imap(tokenize, iterate_texts(path), chunksize=16):
            tokens += len(ids)
            while filled + len(ids) >= SHARD_SIZE:
                shard[filled:] = ids[: SHARD_SIZE - filled]
                np.save(folder / f"train_{shards:06d}.npy", shard)
                ids = ids[SHARD_SIZE - filled :]
                filled, shards = 0, shards + 1
            shard[filled : filled + len(ids)] = ids
            filled += len(ids)
    np.save(folder / f"train_{shards:06d}.npy", shard[:filled])
    return time.perf_counter() - started, tokens


def run_ours(path: Path, folder: Path, num_workers: int) -> tuple[float, int]:
    """Return seconds and tokens of prepare_data.py."""
    started = time.perf_counter()
    flags = ["--files", path, "--output_dir", folder / "ours", "--num_workers", num_workers, "--overwrite"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = prepare_data.main([str(flag) for flag in flags])
    assert code == 0
    return time.perf_counter() - started, load_manifest(folder / "ours").read.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, nargs="+", default=[10e6, 100e6], help="sizes of the corpus, about")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num_workers", type=int, default=count_cores())
    arguments = parser.parse_args()
    global encoding  # the workers inherit it
    documents = list_documents()
    print("  tokens        prepare_data.py       tiktoken pool       ratio   (medians, tokens/s)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encoding = build_tiktoken(folder)
        for n_tokens in arguments.tokens:
            path = folder / "corpus.parquet"
            write_corpus(path, int(n_tokens * BYTES_PER_TOKEN), documents)
            speeds: dict[str, list[float]] = {"ours": [], "baseline": []}
            for _ in range(arguments.rounds):
                for method, run in (("ours", run_ours), ("baseline", run_baseline)):
                    seconds, tokens = run(path, folder, arguments.num_workers)
                    speeds[method].append(tokens / seconds)
            ours, baseline = (statistics.median(values) for values in speeds.values())
            spread = "; ".join(
                f"{method} {min(values) / 1e6:.1f} to {max(values) / 1e6:.1f} M" for method, values in speeds.items()
            )
            print(f"{tokens:12,} {ours:18,.0f} {baseline:18,.0f} {ours / baseline:12.1f}   ({spread})", flush=True)


if __name__ == "__main__":
    main()
