"""The statistics of a folder of shards, against plain Python, and the documents that `--inspect` reads."""

import collections
import itertools
import tracemalloc

import numpy as np
import pytest

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.data import shards
from modeling_gpt2_repro.data.inspection import choose_documents, inspect_folder, scan_split

EOT, VOCAB_SIZE = 9, 12
BYTE_LENGTHS = np.array([1, 1, 1, 2, 2, 3, 4, 1, 7, 0, 1, 1])


def draw_layout(seed):
    """Return a split's tokens, with any share of end-of-text ids from none to nearly all, cut into files."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, VOCAB_SIZE, generator.integers(1, 120), dtype=np.uint16)
    tokens[tokens == EOT] = 0
    tokens[generator.random(len(tokens)) < generator.choice([0, 0.03, 0.2, 0.9])] = EOT
    if seed % 2:
        tokens[0] = EOT
    cuts = np.sort(generator.integers(1, len(tokens) + 1, generator.integers(0, 5)))
    return tokens, [piece for piece in np.split(tokens, cuts) if len(piece)]


def write_files(folder, pieces, split="train"):
    files = {folder / f"x_{split}_{i:06d}.npy": piece for i, piece in enumerate(pieces)}
    for path, piece in files.items():
        np.save(path, piece)
    return shards.map_files(folder, split)


def cut_documents(tokens):
    """Return the documents with their positions, and the number of tokens before the first."""
    documents, before = [], 0
    for position, token in enumerate(tokens.tolist()):
        if token == EOT:
            documents.append((position, []))
        elif documents:
            documents[-1][1].append(token)
        else:
            before += 1
    return documents, before


@pytest.fixture(params=range(40))
def scanned(request, tmp_path, monkeypatch):
    """The statistics of a split in several files of several chunks each, and its tokens."""
    monkeypatch.setattr(shards, "TOKENS_PER_CHUNK", 7)
    tokens, pieces = draw_layout(request.param)
    progress = []
    statistics = scan_split("train", write_files(tmp_path, pieces), EOT, BYTE_LENGTHS, progress.append)
    assert sum(progress) == len(tokens)
    return statistics, tokens


def test_counts_match_plain_python(scanned):
    statistics, tokens = scanned
    documents, before = cut_documents(tokens)
    lengths = sorted(1 + len(ids) for _, ids in documents)
    assert (statistics.tokens, statistics.documents) == (len(tokens), len(documents))
    assert statistics.tokens_before_first == before
    counts = collections.Counter(tokens.tolist())
    assert statistics.token_counts.tolist() == [counts[index] for index in range(VOCAB_SIZE)]
    assert statistics.ids_in_use == len(counts)
    assert statistics.text_bytes == sum(int(BYTE_LENGTHS[token]) for token in tokens)
    assert list(statistics.lengths) == sorted(set(lengths))
    assert dict(zip(statistics.lengths, statistics.length_counts, strict=True)) == collections.Counter(lengths)
    most_common = sorted(counts, key=lambda token: (-counts[token], token))
    assert statistics.list_most_common(4) == most_common[:4]
    assert statistics.list_most_common(VOCAB_SIZE) == most_common
    if lengths:
        assert statistics.mean_length == pytest.approx(sum(lengths) / len(lengths))
        for percent in (0, 10, 50, 90, 100):
            below = [length for length in lengths if 100 * sum(x <= length for x in lengths) >= percent * len(lengths)]
            assert statistics.find_length(percent) == below[0]


def test_every_document_is_found_at_its_position(scanned):
    statistics, tokens = scanned
    files = {path.name: piece for path, piece in statistics.files.items()}
    file_starts = dict(zip(files, itertools.accumulate(map(len, files.values()), initial=0), strict=False))
    for number, (start, ids) in enumerate(cut_documents(tokens)[0]):
        whole = statistics.read_document(number, 1000)
        assert (whole.split, whole.ids.tolist(), whole.tokens) == ("train", ids, 1 + len(ids))
        assert files[whole.file][whole.position] == EOT
        assert file_starts[whole.file] + whole.position == start
        front = statistics.read_document(number, 2)
        assert (front.ids.tolist(), front.tokens, front.position) == (ids[:2], whole.tokens, whole.position)


def test_memory_does_not_grow_with_the_documents(monkeypatch):
    monkeypatch.setattr(shards, "TOKENS_PER_CHUNK", 2**16)
    tokens = np.random.default_rng(0).integers(0, 2, 4_000_000, dtype=np.uint16)
    tracemalloc.start()
    try:
        statistics = scan_split("train", {"file": tokens}, 1, BYTE_LENGTHS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert statistics.documents == np.count_nonzero(tokens)
    # The lengths of two million documents take 16 MB.
    assert peak < 8e6


def scan_splits(folder):
    """Scan splits of three and five documents."""
    pieces = {"val": [[EOT, 1, EOT, 2, EOT, 3]], "train": [[EOT, 4, EOT, 5], [EOT, 6, EOT, 7, EOT, 8]]}
    return [
        scan_split(
            split, write_files(folder, [np.array(piece, np.uint16) for piece in of_split], split), EOT, BYTE_LENGTHS
        )
        for split, of_split in pieces.items()
    ]


def test_documents_of_both_splits_are_equally_likely(tmp_path):
    splits = scan_splits(tmp_path)
    seen = collections.Counter()
    for seed in range(800):
        chosen = [int(document.ids[0]) for document in choose_documents(splits, 2, seed, 10)]
        assert len(set(chosen)) == 2
        seen.update(chosen)
    # 200 times each, within four standard deviations.
    assert set(seen) == set(range(1, 9))
    assert max(abs(count - 200) for count in seen.values()) < 4 * (800 * 0.25 * 0.75) ** 0.5


def test_the_choice_depends_on_the_seed_only(tmp_path):
    splits = scan_splits(tmp_path)

    def choose(count, seed):
        return [(document.file, document.position) for document in choose_documents(splits, count, seed, 10)]

    assert choose(3, 1) == choose(3, 1)
    assert len({tuple(choose(3, seed)) for seed in range(10)}) > 5
    assert choose(0, 1) == []
    everything = [("x_val_000000.npy", position) for position in (0, 2, 4)]
    everything += [("x_train_000000.npy", position) for position in (0, 2)]
    everything += [("x_train_000001.npy", position) for position in (0, 2, 4)]
    assert choose(8, 1) == choose(99, 2) == everything


def test_a_folder_without_manifest_is_assumed_to_be_gpt2(gpt2_shards, tokenizer):
    inspected = inspect_folder(gpt2_shards, 3, 0, 50)
    assert inspected.manifest is None
    assert (len(inspected.tokenizer), inspected.tokenizer.eos_token_id) == (50257, 50256)
    assert [(split.split, split.documents) for split in inspected.splits] == [("val", 16), ("train", 144)]
    for document in inspected.documents:
        assert "lighthouse" in tokenizer.decode(document.ids) or document.tokens > 51
    # The decoded text, byte for byte.
    val = tokenizer.decode(np.load(next(gpt2_shards.glob("*val*"))), skip_special_tokens=True)
    assert inspected.splits[0].text_bytes == len(val.encode())


def test_a_single_split_is_enough(tmp_path):
    write_files(tmp_path, [np.array([50256, 1, 2], np.uint16)], "val")
    inspected = inspect_folder(tmp_path, 5, 0, 10)
    assert [split.split for split in inspected.splits] == ["val"]
    assert [document.ids.tolist() for document in inspected.documents] == [[1, 2]]


def test_first_id_beyond_the_vocabulary_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "TOKENS_PER_CHUNK", 7)
    pieces = [np.zeros(20, np.uint16), np.zeros(30, np.uint16)]
    pieces[1][[16, 17, 25]] = VOCAB_SIZE, 60_000, 13
    with pytest.raises(UserError, match=r"000001\.npy has 3 ids beyond .* 12, the first, 12, at position 16"):
        scan_split("train", write_files(tmp_path, pieces), EOT, BYTE_LENGTHS)


def test_the_vocabulary_size_itself_is_beyond_the_vocabulary(tmp_path):
    files = write_files(tmp_path, [np.array([EOT, VOCAB_SIZE - 1], np.uint16)])
    assert scan_split("train", files, EOT, BYTE_LENGTHS).tokens == 2
    files = write_files(tmp_path, [np.array([EOT, VOCAB_SIZE], np.uint16)])
    with pytest.raises(UserError, match="has 1 ids beyond"):
        scan_split("train", files, EOT, BYTE_LENGTHS)


def test_folders_with_nothing_to_count_are_rejected(tmp_path):
    with pytest.raises(UserError, match="there is no data folder"):
        inspect_folder(tmp_path / "none", 1, 0, 10)
    with pytest.raises(UserError, match="has no train shards"):
        inspect_folder(tmp_path, 1, 0, 10)
    write_files(tmp_path, [np.empty(0, np.uint16)])
    with pytest.raises(UserError, match="contain no tokens"):
        inspect_folder(tmp_path, 1, 0, 10)
    (tmp_path / shards.WORK_FOLDER).mkdir()
    with pytest.raises(UserError, match="unfinished"):
        inspect_folder(tmp_path, 1, 0, 10)
