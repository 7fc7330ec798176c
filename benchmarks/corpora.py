"""Text for benchmarks of data preparation, as parquet files with FineWeb-Edu's columns.

Three kinds: `write_documentation` repeats a fixed pool of paragraphs, so its words are few. `write_zipfian` draws
every word anew, so no sentence repeats and new words never cease, as in web text. `write_new_words` repeats no word
at all.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from modeling_gpt2_repro.data.sources.corpus import build_docstring_corpus
from modeling_gpt2_repro.data.tokenizer import load_tokenizer

SCHEMA = pa.schema({"text": pa.large_string(), "id": pa.string(), "url": pa.string(), "language_score": pa.float64()})
ROWS_PER_GROUP = 1000
# Measured on the corpora below, to reach the requested size roughly.
BYTES_PER_TOKEN = {"documentation": 3.9, "zipfian": 4.4}
# A random word of seven letters and its space are about this many GPT-2 tokens.
TOKENS_PER_NEW_WORD = 4.5
NEW_WORDS_PER_DOCUMENT = 250

# The zipfian text. 10 B tokens of FineWeb-Edu are about ten million documents: a thousand tokens each on average.
VOCABULARY_SIZE = 300_000
ZIPF_EXPONENT, ZIPF_OFFSET = 1.1, 2.7  # Zipf-Mandelbrot: p(rank) ~ (rank + offset) ** -exponent
NEW_WORD_SHARE = 0.01  # of all words; half of them numbers, half names
WORDS_PER_DOCUMENT, LENGTH_SIGMA = 720, 0.9  # mean, and standard deviation of the logarithm
SEPARATORS = {" ": 0.88, ", ": 0.06, ". ": 0.05, ".\n\n": 0.01}
ENDS_SENTENCE = np.array([separator.startswith(".") for separator in SEPARATORS])


class ZipfianText:
    """Documents of words drawn independently from a Zipf-Mandelbrot distribution, with a share of new words.

    The frequent words are GPT-2's own whole-word tokens, in the order of their merges, which is roughly that of their
    frequency; the rare ones are a token followed by the letters of another. Names are three random syllables, numbers
    are log-uniform up to 10^9. The word after a period is capitalized.
    """

    def __init__(self, seed: int, vocabulary_size: int = VOCABULARY_SIZE):
        self.generator = np.random.default_rng(seed)
        words = self._build_words(vocabulary_size)
        self.n_words = len(words)
        vocabulary = pa.array(words, pa.large_string())
        self.fixed = pa.concat_arrays(
            [vocabulary, pc.utf8_capitalize(vocabulary), pa.array(SEPARATORS, pa.large_string())]
        )
        weights = (np.arange(1, self.n_words + 1) + ZIPF_OFFSET) ** -ZIPF_EXPONENT
        self.cumulative = np.cumsum(weights) / weights.sum()
        consonants, vowels = "bcdfghklmnprstvwz", "aeiou"
        self.syllables = pa.array(
            [a + b + c for a in consonants for b in vowels for c in consonants], pa.large_string()
        )

    def _build_words(self, size: int) -> list[str]:
        vocabulary = load_tokenizer().get_vocab()
        tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        bare = (token[1:] for token in tokens if token[0] == "Ġ" and token.isalpha() and token[1:].isascii())
        common = [word for word in bare if len(word) > 1 or word in ("a", "I")][:size]
        tails = [token for token in tokens if token.isascii() and token.isalpha() and token.islower()]
        found = dict.fromkeys(common)
        while len(found) < size:
            heads, ends = (self.generator.integers(0, len(each), size) for each in (common, tails))
            for head, end in zip(heads, ends, strict=True):
                found[common[head] + tails[end]] = None
                if len(found) == size:
                    break
        return list(found)

    def draw(self, n_documents: int) -> pa.LargeStringArray:
        """Return new documents."""
        mean_log = np.log(WORDS_PER_DOCUMENT) - LENGTH_SIGMA**2 / 2
        lengths = np.maximum(20, self.generator.lognormal(mean_log, LENGTH_SIGMA, n_documents)).astype(np.int64)
        ends = np.cumsum(lengths)
        n_words = int(ends[-1])
        words = np.searchsorted(self.cumulative, self.generator.random(n_words))
        separators = self.generator.choice(len(SEPARATORS), n_words, p=list(SEPARATORS.values()))
        separators[ends - 1] = len(SEPARATORS) - 1
        is_first = np.roll(ENDS_SENTENCE[separators], 1)
        words[is_first] += self.n_words
        is_new = self.generator.random(n_words) < NEW_WORD_SHARE
        words[is_new] = len(self.fixed) + np.arange(np.count_nonzero(is_new))
        pieces = np.empty(2 * n_words, np.int64)
        pieces[::2], pieces[1::2] = words, 2 * self.n_words + separators
        pool = pa.concat_arrays([self.fixed, *self._draw_new_words(np.count_nonzero(is_new))])
        text = pool.take(pa.array(pieces))
        # The pieces are contiguous: every document is a range of their bytes.
        _, offsets, characters = text.buffers()
        starts = np.frombuffer(offsets, np.int64)[2 * np.concatenate([[0], ends])]
        return pa.LargeStringArray.from_buffers(n_documents, pa.py_buffer(starts), characters)

    def _draw_new_words(self, n_words: int) -> Iterator[pa.LargeStringArray]:
        n_names = n_words // 2
        parts = (
            self.syllables.take(pa.array(self.generator.integers(0, len(self.syllables), n_names))) for _ in "123"
        )
        yield pc.utf8_capitalize(pc.binary_join_element_wise(*parts, pa.scalar("", pa.large_string())))
        numbers = np.power(10, self.generator.uniform(0, 9, n_words - n_names)).astype(np.int64)
        yield pc.cast(pa.array(numbers), pa.large_string())


def write_zipfian(folder: Path, n_tokens: float, n_files: int = 1) -> None:
    """Write about `n_tokens` tokens of text whose sentences do not repeat."""
    text = ZipfianText(seed=0)
    _write_until(folder, n_files, n_tokens * BYTES_PER_TOKEN["zipfian"], lambda: text.draw(ROWS_PER_GROUP))


def write_documentation(folder: Path, n_tokens: float, n_files: int = 1) -> None:
    """Write about `n_tokens` tokens of the installed packages' documentation, repeated.

    Each repetition puts a document's paragraphs in another order, so that no two documents are equal.
    """
    documents, generator = itertools.cycle(_list_documentation()), np.random.default_rng(0)

    def draw() -> pa.LargeStringArray:
        paragraphs = (next(documents) for _ in range(ROWS_PER_GROUP))
        texts = ["\n\n".join(each[index] for index in generator.permutation(len(each))) for each in paragraphs]
        return pa.array(texts, pa.large_string())

    _write_until(folder, n_files, n_tokens * BYTES_PER_TOKEN["documentation"], draw)


def write_new_words(folder: Path, n_tokens: float, n_files: int = 1) -> None:
    """Write about `n_tokens` tokens of random words of seven letters, hardly any of which occurs twice."""
    generator = np.random.default_rng(0)

    def draw() -> pa.LargeStringArray:
        letters = generator.integers(97, 123, (ROWS_PER_GROUP, NEW_WORDS_PER_DOCUMENT, 8), dtype=np.uint8)
        letters[:, :, 0] = 32
        return pa.array([document.tobytes().decode() for document in letters], pa.large_string())

    _write_until(folder, n_files, n_tokens / TOKENS_PER_NEW_WORD * 8, draw)


def count_words(folder: Path) -> tuple[int, int, int, int]:
    """Return the documents, bytes, words and distinct words (between spaces, without punctuation) of a folder."""
    n_documents = n_bytes = n_words = 0
    distinct: set[str] = set()
    for path in sorted(folder.glob("*.parquet")):
        for batch in pa.parquet.ParquetFile(path).iter_batches(columns=["text"]):
            texts = batch.column(0)
            words = pc.utf8_trim(pc.utf8_split_whitespace(texts).flatten(), ".,;:!?()[]{}'\"`*=")
            n_documents += len(texts)
            n_bytes += pc.sum(pc.binary_length(texts)).as_py()
            n_words += len(words)
            distinct.update(pc.unique(words).to_pylist())
    return n_documents, n_bytes, n_words, len(distinct)


@functools.cache
def _list_documentation() -> list[list[str]]:
    """Return the paragraphs of each document of the built-in corpus."""
    batches = (batch for task in build_docstring_corpus().tasks for batch in task.read_batches())
    return [text.split("\n\n") for batch in batches for text in batch.to_pylist()]


def _write_until(folder: Path, n_files: int, n_bytes: float, draw: Callable[[], pa.LargeStringArray]) -> None:
    """Write row groups to `n_files` files in turn until they contain `n_bytes` of text."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        paths = [folder / f"corpus_{number}.parquet" for number in range(n_files)]
        writers = [stack.enter_context(pa.parquet.ParquetWriter(path, SCHEMA)) for path in paths]
        written = number = 0
        while written < n_bytes or number < n_files:
            texts = draw()
            written += pc.sum(pc.binary_length(texts)).as_py()
            names = [generator.bytes(16).hex() for _ in range(len(texts))]
            urls = [f"https://example.org/{name}" for name in names]
            columns = [texts, pa.array(names), pa.array(urls), pa.array(np.ones(len(texts)))]
            writers[number % n_files].write_table(pa.Table.from_arrays(columns, schema=SCHEMA))
            number += 1
