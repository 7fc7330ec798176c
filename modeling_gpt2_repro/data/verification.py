"""Checking a data folder against its manifest for files lost, changed, renamed or added since it was built."""

from pathlib import Path

import numpy as np

from ..core.errors import UnreadableError, UserError
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

    Every shard must exist under its name with the right type, size and checksum, and no other shards may exist. The
    manifest's other files must match, document counts must add up, every id must be below `vocab_size`, each split
    must begin with the end-of-text id, and no document may be empty.

    Raises:
        UserError: there is no manifest, or something differs; the message lists all differences by file and position.
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
            f"{folder} differs from its manifest: {'; '.join(problems)}: restore the files, or rebuild the folder "
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
        f"{shard.file} is " + (f"now {path.name}" if (path := found.get(shard.checksum)) else "missing")
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
            problems.append(f"{name} has a different checksum")
    return problems


def _check_split(folder: Path, split: Split, manifest: Manifest) -> list[str]:
    problems = []
    shards = manifest.list_shards(split)
    documents, expected = sum(shard.documents for shard in shards), getattr(manifest, split).documents
    if documents != expected:
        problems.append(
            f"{MANIFEST_NAME} lists {documents:,} documents in the {split} shards, but {expected:,} in the split"
        )
    follows_eot = False
    for shard in shards:
        path = folder / shard.file
        try:
            tokens = map_shard(path)
        except UnreadableError:
            raise
        except UserError as error:
            if path.exists():  # `_check_names` reports missing files
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
    """Check the beginning and the end of a split.

    If the validation split ends inside a document, it may contain just that document's end-of-text id. The remainder,
    which has no such id, may be anywhere in the training split, including its beginning.
    """
    is_cut = manifest.validation_ends_inside_document
    shards = manifest.list_shards(shard.split)
    problems = []
    may_begin_inside = is_cut and shard.split == "train"
    if shard is shards[0] and not may_begin_inside and len(tokens) and tokens[0] != manifest.eot_id:
        problems.append(f"begins inside a document: id {tokens[0]} at position 0")
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
    owner = next((f", that of {other.file}" for other in manifest.shards if other.checksum == checksum), "")
    return [f"has a different checksum{owner}"]


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
        problems.append(f"has {empty:,} empty documents, the first of which ends at position {first_empty:,}")
    return problems
