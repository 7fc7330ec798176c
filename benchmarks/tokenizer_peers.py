"""Programs that turn parquet files into token files, for `bench_prepare_data.py`.

Each `run_...(source, target, num_workers)` reads all parquet files of a folder, writes uint16 tokens to another, and
returns the seconds and the number of tokens, an end-of-text token per document included.
"""

import contextlib
import functools
import importlib.util
import io
import json
import logging
import multiprocessing
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import gigatoken
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

import prepare_data
from modeling_gpt2_repro.data.prepare.encoder import define_text_encoding
from modeling_gpt2_repro.data.shards import load_manifest
from modeling_gpt2_repro.data.tokenizer import load_tokenizer

# tiktoken_ext/openai_public.py, gpt2
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
EOT_ID = 50256
SHARD_SIZE = 100_000_000
RowGroup = tuple[Path, int]


def run_prepare_data(source: Path, target: Path, num_workers: int) -> tuple[float, int]:
    """Run prepare_data.py."""
    flags = ["--files", source / "*.parquet", "--output_dir", target / "shards", "--num_workers", num_workers]
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = prepare_data.main([str(flag) for flag in flags])
    seconds = time.perf_counter() - started
    if code != 0:
        raise RuntimeError(f"prepare_data.py exited with {code}: {output.getvalue()}")
    return seconds, load_manifest(target / "shards").read.tokens


def run_gigatoken_pool(source: Path, target: Path, num_workers: int) -> tuple[float, int]:
    """Encode with gigatoken in a process pool: each task is a row group, and the source order stays."""
    encoder = _build_gigatoken()
    started = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(num_workers, _set_encoder, (encoder,)) as pool:
        n_tokens = _save_shards(pool.imap(_encode_row_group, _list_row_groups(source)), target)
    return time.perf_counter() - started, n_tokens


def run_tiktoken_pool(source: Path, target: Path, num_workers: int) -> tuple[float, int]:
    """Encode with tiktoken as build-nanogpt does: a process pool, in which each task is 16 documents."""
    encoder = build_tiktoken()
    started = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(num_workers, _set_encoder, (encoder,)) as pool:
        n_tokens = _save_shards(pool.imap(_encode_document, _iterate_texts(source), chunksize=16), target)
    return time.perf_counter() - started, n_tokens


def run_datatrove(source: Path, target: Path, num_workers: int) -> tuple[float, int]:
    """Run datatrove's DocumentTokenizer, with its default shuffle within each task's file, locally."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.utils.logging import logger

    logger.remove()
    logging.getLogger("datatrove").setLevel(logging.ERROR)
    tokenizer_file = target / "tokenizer.json"
    load_tokenizer().backend_tokenizer.save(str(tokenizer_file))
    output, logs = target / "tokens", target / "logs"
    reader = ParquetReader(str(source), glob_pattern="*.parquet", read_metadata=False)
    writer = DocumentTokenizer(str(output), str(tokenizer_file), eos_token="<|endoftext|>", seed=0)
    executor = LocalPipelineExecutor(
        [reader, writer], tasks=num_workers, workers=num_workers, logging_dir=str(logs), start_method="fork"
    )
    started = time.perf_counter()
    executor.run()
    seconds = time.perf_counter() - started
    return seconds, sum(path.stat().st_size for path in output.glob("*.ds")) // 2


def find_missing_package(peer: str) -> str | None:
    """Return the name of the package that a peer needs and that is not installed."""
    return "datatrove" if peer == "datatrove" and importlib.util.find_spec("datatrove") is None else None


PEERS = {
    "prepare_data.py": run_prepare_data,
    "gigatoken pool": run_gigatoken_pool,
    "tiktoken pool": run_tiktoken_pool,
    "datatrove": run_datatrove,
}
NOTES = {
    "prepare_data.py": "encodes with gigatoken, shuffles all documents globally, splits off validation documents, "
    "counts exact duplicates, writes checksums and a manifest, checks counts, syncs to disk, and resumes if killed",
    "gigatoken pool": "the same engine alone; leaves out the global shuffle, the validation split, the count of exact "
    "duplicates, checksums, manifest and checks, and crash safety; its memory grows with the number of distinct words",
    "tiktoken pool": "build-nanogpt's method, with a leaner reader (texts instead of whole rows); leaves out the same",
    "datatrove": "encodes with `tokenizers`, shuffles within each task's file, writes an index, resumes whole "
    "tasks; leaves out a global shuffle, the validation split, the count of exact duplicates, checksums and manifest",
}


@functools.cache
def build_tiktoken() -> tiktoken.Encoding:
    """Build tiktoken's GPT-2 encoding from this package's tokenizer, without a download."""
    definition = json.loads(load_tokenizer().backend_tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in definition["merges"]]
    with tempfile.TemporaryDirectory() as name:
        vocabulary, ranks = Path(name) / "encoder.json", Path(name) / "vocab.bpe"
        vocabulary.write_text(json.dumps(definition["vocab"]))
        ranks.write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        mergeable_ranks = data_gym_to_mergeable_bpe_ranks(str(ranks), str(vocabulary))
    return tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=mergeable_ranks, special_tokens={"<|endoftext|>": EOT_ID}
    )


def _build_gigatoken() -> gigatoken.Tokenizer:
    """Return a new engine, whose cache is empty, that encodes special tokens in a text as ordinary text."""
    import awkward  # noqa: F401  half a second, which is not timed for the other peers either

    return gigatoken.Tokenizer.from_json(json.dumps(define_text_encoding(load_tokenizer())))


def _set_encoder(encoder: gigatoken.Tokenizer | tiktoken.Encoding) -> None:
    """Keep the encoder of a worker, which inherits it by fork."""
    global _encoder
    _encoder = encoder


def _encode_row_group(row_group: RowGroup) -> np.ndarray:
    """Read and encode a row group in a worker."""
    path, number = row_group
    texts = pa.parquet.ParquetFile(path).read_row_group(number, columns=["text"]).column(0).to_pylist()
    encoded = _encoder.encode_batch(texts, parallel=False).layout
    offsets = np.asarray(encoded.offsets.data, dtype=np.int64)
    tokens = np.asarray(encoded.content.data)[offsets[0] : offsets[-1]].astype(np.uint16)
    return np.insert(tokens, offsets[:-1] - offsets[0], EOT_ID)


def _encode_document(text: str) -> np.ndarray:
    """Encode one document in a worker."""
    return np.array([EOT_ID, *_encoder.encode_ordinary(text)], dtype=np.uint16)


def _list_row_groups(source: Path) -> Iterator[RowGroup]:
    for path in sorted(source.glob("*.parquet")):
        yield from ((path, number) for number in range(pa.parquet.ParquetFile(path).num_row_groups))


def _iterate_texts(source: Path) -> Iterator[str]:
    for path in sorted(source.glob("*.parquet")):
        for batch in pa.parquet.ParquetFile(path).iter_batches(columns=["text"]):
            yield from batch.column(0).to_pylist()


def _save_shards(encoded: Iterable[np.ndarray], target: Path) -> int:
    """Write arrays of tokens one after the other to shards, and return the number of tokens."""
    shard = np.empty(SHARD_SIZE, dtype=np.uint16)
    filled = n_shards = n_tokens = 0
    for ids in encoded:
        n_tokens += len(ids)
        while filled + len(ids) >= SHARD_SIZE:
            shard[filled:] = ids[: SHARD_SIZE - filled]
            np.save(target / f"train_{n_shards:06d}.npy", shard)
            ids = ids[SHARD_SIZE - filled :]
            filled, n_shards = 0, n_shards + 1
        shard[filled : filled + len(ids)] = ids
        filled += len(ids)
    np.save(target / f"train_{n_shards:06d}.npy", shard[:filled])
    return n_tokens
