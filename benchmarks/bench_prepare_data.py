"""Throughput of prepare_data.py and of other programs that turn parquet files into token files.

    python benchmarks/bench_prepare_data.py [--tokens 10e6 100e6] [--texts zipfian documentation] [--rounds 3]

The peers are a process pool over gigatoken (the engine of prepare_data.py, without the rest of it), a pool over
tiktoken (build-nanogpt's method), and datatrove's DocumentTokenizer if it is installed (`pip install datatrove`). All
read the same parquet files and write uint16 tokens with --num_workers processes. They take turns, and the first one
changes from round to round. Everything from the files to the finished shards is timed, starting workers included;
imports and loading the tokenizers of the peers are not. What each peer leaves out is in the `notes` of the results.

The zipfian text repeats no sentence, and new words never cease. The documentation repeats the same paragraphs in
another order, so its words soon lie in the cache of gigatoken, which remembers each word that it has encoded: that
flatters prepare_data.py and the gigatoken pool. `corpora.py` describes both.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.corpora import count_words, write_documentation, write_zipfian
from benchmarks.measurements import Report, build_parser
from benchmarks.tokenizer_peers import NOTES, PEERS, find_missing_package
from modeling_gpt2_repro.core.devices import count_cores

TEXTS = {"zipfian": write_zipfian, "documentation": write_documentation}


def describe_text(report: Report, part: str, source: Path, n_tokens: int) -> None:
    """Report what the text of a folder consists of."""
    n_documents, n_bytes, n_words, n_distinct = count_words(source)
    report.add(part, "text", n_tokens, "tokens")
    report.add(part, "text", n_documents, "documents")
    report.add(part, "text", n_bytes / n_tokens, "bytes per token")
    report.add(part, "text", 100 * n_distinct / n_words, "distinct words per 100 words")


def measure(report: Report, part: str, source: Path, peers: list[str], options: argparse.Namespace) -> None:
    """Measure the throughput of the peers on a folder of parquet files, taking turns."""
    rates: dict[str, list[float]] = {name: [] for name in peers}
    tokens: dict[str, int] = {}
    for number in range(options.rounds):
        first = number % len(peers)
        for name in peers[first:] + peers[:first]:
            os.sync()  # or a peer would wait for the disk to write the previous one's files
            with tempfile.TemporaryDirectory() as target:
                seconds, tokens[name] = PEERS[name](source, Path(target), options.num_workers)
            rates[name].append(tokens[name] / seconds)
            print(f"{part}, {name}: {rates[name][-1]:,.0f} tokens/s", flush=True)
    # datatrove recognizes an end-of-text token in a text; the others encode its letters.
    if max(tokens.values()) > 1.001 * min(tokens.values()):
        raise RuntimeError(f"the peers disagree on the number of tokens: {tokens}")
    describe_text(report, part, source, tokens[peers[0]])
    for name in peers:
        report.add_median(part, name, rates[name], "tokens/s")
    report.compare(part, peers[0], *peers[1:])


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__, "prepare_data")
    parser.add_argument("--tokens", type=float, nargs="+", default=[10e6, 100e6], help="approximate sizes")
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), choices=TEXTS)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num_workers", type=int, default=count_cores())
    options = parser.parse_args(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes of datatrove occupy the cores
    report = Report("prepare_data", options)
    peers = [name for name in options.peers if find_missing_package(name) is None]
    for name in options.peers:
        if name in peers:
            report.notes[name] = NOTES[name]
        else:
            package = find_missing_package(name)
            report.omit("all", name, f"not installed: pip install --constraint constraints.txt {package}")
    for text in options.texts:
        for n_tokens in options.tokens:
            with tempfile.TemporaryDirectory() as name:
                TEXTS[text](Path(name), n_tokens, n_files=options.num_workers)
                measure(report, f"{text} text, {n_tokens / 1e6:g} M tokens", Path(name), peers, options)
    report.write(options.output)


if __name__ == "__main__":
    main()
