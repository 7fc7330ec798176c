"""Readers of the trackers' output: wandb's offline runs and TensorBoard's event files."""

import json
import struct
import time
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from wandb.proto import wandb_internal_pb2

PATIENCE_SECONDS = 120
HEADER_BYTES, BLOCK_BYTES = 7, 32768
FULL, LAST = 1, 4


def read_wandb_run(path: Path, is_whole: bool = True) -> dict[str, Any]:
    """Read a `.wandb` file: `id`, `name`, `config`, `summary`, and `history`, its metrics by step.

    wandb writes the end of the file after `finish` has returned, so this waits for a whole run to be complete.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while "exit" not in (run := _parse_wandb(path)) and is_whole:
        assert time.monotonic() < deadline, f"{path} is still incomplete after {PATIENCE_SECONDS} s"
        time.sleep(0.05)
    return run


def _parse_wandb(path: Path) -> dict[str, Any]:
    run: dict[str, Any] = {"config": {}, "summary": {}, "history": {}}
    for content in _split_log(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run |= {"id": record.run.run_id, "name": record.run.display_name}
        if kind == "config":
            run["config"] |= _read_items(record.config.update)
        if kind == "summary":
            run["summary"] |= _read_items(record.summary.update)
        if kind == "history":
            items = _read_items(record.history.item)
            run["history"].setdefault(items["_step"], {}).update(items)
        if kind == "exit":
            run["exit"] = record.exit.exit_code
    return run


def _read_items(items) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _split_log(content: bytes) -> list[bytes]:
    """Return the complete records of a LevelDB log that follows wandb's header; the file may still be growing."""
    records, parts, place = [], [], HEADER_BYTES
    while place + HEADER_BYTES <= len(content):
        if BLOCK_BYTES - place % BLOCK_BYTES < HEADER_BYTES:  # padding: too short for a record
            place += BLOCK_BYTES - place % BLOCK_BYTES
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        place += HEADER_BYTES
        if place + length > len(content):
            break
        parts.append(content[place : place + length])
        place += length
        if kind in (FULL, LAST):
            records.append(b"".join(parts))
            parts = []
    return records


def read_tensorboard(folder: Path) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, str]]]:
    """Read an event folder as TensorBoard does: its scalars and its texts, each by name and step."""
    events = EventAccumulator(str(folder), size_guidance={}, tensor_size_guidance={"scalars": 0, "text": 0})
    events.Reload()
    scalars: dict[str, dict[int, float]] = {}
    texts: dict[str, dict[int, str]] = {}
    for tag in events.Tags()["tensors"]:
        values = {event.step: make_ndarray(event.tensor_proto).item() for event in events.Tensors(tag)}
        if tag.endswith("/text_summary"):
            texts[tag.removesuffix("/text_summary")] = {step: text.decode() for step, text in values.items()}
        else:
            scalars[tag] = values
    return scalars, texts
