"""Checking a folder of shards against its manifest: what was lost, changed, renamed or added since it was made."""

from pathlib import Path

import numpy as np

from ..core.errors import RefusedError, UserError
from ..core.files import compute_checksum
from .foreign_shards import SHARD_SUFFIXES
from .shards import (
    MANIFEST_NAME,
    SPLITS,
    Manifest,
    Shard,
    Split,
    describe_ids_beyond,
    iterate_chunks,
    load_manifest,
    map_shard,
)


def verify_folder(folder: str | Path) -> Manifest:
    """Check a folder against its manifest and the rules of the format.

    Every shard is there under its name, of the right type, size and checksum, and there are no other shards; so
    are the manifest's other files; the documents add up; every id is below `vocab_size`; each split begins with the
    end-of-text id, and no document is empty.

    Raises:
        UserError: no manifest, or anything that differs; the message names each by file and position in the file.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} has no {MANIFEST_NAME} to check against")
    problems = [*_check_names(folder, manifest), *_check_other_files(folder, manifest)]
    for split in SPLITS:
        problems += _check_split(folder, split, manifest)
    if problems:
        raise UserError(
            f"{folder} differs from its manifest: {'; '.join(problems)}: put that right, or make the folder again "
            "with --overwrite"
        )
    return manifest


def _check_names(folder: Path, manifest: Manifest) -> list[str]:
    listed = {shard.file for shard in manifest.shards} | {MANIFEST_NAME} | manifest.other_files.keys()
    others = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in listed)
    missing = [shard for shard in manifest.shards if not (folder / shard.file).exists()]
    found = {compute_checksum(path): path for path in others} if missing else {}
    renamed = [found[shard.checksum] for shard in missing if shard.checksum in found]
    problems = [
        f"{shard.file} is " + (f"there as {path.name}" if (path := found.get(shard.checksum)) else "missing")
        for shard in missing
    ]
    unlisted = [path for path in others if path.suffix in SHARD_SUFFIXES and path not in renamed]
    return problems + [f"{path.name} is not in the manifest" for path in unlisted]


def _check_other_files(folder: Path, manifest: Manifest) -> list[str]:
    problems = []
    for name, checksum in manifest.other_files.items():
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif compute_checksum(folder / name) != checksum:
            problems.append(f"{name} has another checksum")
    return problems


def _check_split(folder: Path, split: Split, manifest: Manifest) -> list[str]:
    problems = []
    shards = manifest.list_shards(split)
    documents, expected = sum(shard.documents for shard in shards), getattr(manifest, split).documents
    if documents != expected:
        problems.append(f"{MANIFEST_NAME} has {documents:,} documents in the {split} shards, {expected:,} in all")
    follows_eot = False
    for shard in shards:
        path = folder / shard.file
        try:
            tokens = map_shard(path)
        except RefusedError:
            raise
        except UserError as error:
            if path.exists():  # `_check_names` reports missing ones
                problems.append(f"{shard.file} cannot be read ({error})")
            follows_eot = False
            continue
        found = _check_file(path, len(tokens), shard, manifest)
        found += _check_tokens(tokens, shard, manifest, follows_eot)
        found += _check_ends(tokens, shard, manifest)
        problems += [f"{shard.file} {problem}" for problem in found]
        follows_eot = _ends_with_eot(tokens, manifest)
    return problems


def _check_ends(tokens: np.ndarray, shard: Shard, manifest: Manifest) -> list[str]:
    """Check how a split begins and ends.

    If the validation split ends inside a document, it may have no more of it than its end-of-text id; and the rest of
    that document, which has no such id, is anywhere in the training split, perhaps at its front.
    """
    is_cut = manifest.validation_ends_inside_document
    shards = manifest.list_shards(shard.split)
    problems = []
    may_begin_inside = is_cut and shard.split == "train"
    if shard is shards[0] and not may_begin_inside and len(tokens) and tokens[0] != manifest.eot_id:
        problems.append(f"begins inside a document: the id {tokens[0]} is at position 0")
    may_end_empty = is_cut and shard.split == "val"
    if shard is shards[-1] and not may_end_empty and _ends_with_eot(tokens, manifest):
        problems.append(f"ends with an empty document at position {len(tokens) - 1:,}")
    return problems


def _ends_with_eot(tokens: np.ndarray, manifest: Manifest) -> bool:
    return len(tokens) > 0 and tokens[-1] == manifest.eot_id


def _check_file(path: Path, n_tokens: int, shard: Shard, manifest: Manifest) -> list[str]:
    if n_tokens != shard.tokens:
        return [f"has {n_tokens:,} tokens instead of {shard.tokens:,}"]
    checksum = compute_checksum(path)
    if checksum == shard.checksum:
        return []
    owner = next((f": it is {other.file}" for other in manifest.shards if other.checksum == checksum), "")
    return [f"has another checksum{owner}"]


def _check_tokens(tokens: np.ndarray, shard: Shard, manifest: Manifest, follows_eot: bool) -> list[str]:
    documents = empty = first_empty = largest_id = 0
    for start, chunk in iterate_chunks(tokens):
        is_eot = chunk == manifest.eot_id
        documents += int(np.count_nonzero(is_eot))
        largest_id = max(largest_id, int(chunk.max()))
        positions = np.flatnonzero(is_eot & np.concatenate([[follows_eot], is_eot[:-1]]))
        if len(positions):
            first_empty = first_empty if empty else start + int(positions[0])
            empty += len(positions)
        follows_eot = is_eot[-1]
    problems = []
    if largest_id >= manifest.vocab_size:
        problems.append(describe_ids_beyond(tokens, manifest.vocab_size))
    if documents != shard.documents:
        problems.append(f"has {documents:,} documents instead of {shard.documents:,}")
    if empty:
        problems.append(f"has {empty:,} empty documents, the first ends at position {first_empty:,}")
    return problems
