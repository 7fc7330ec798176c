"""Files of the work folder that appear whole, and the JSON records that make a task or a part a finished one."""

import contextlib
import dataclasses
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from modeling_gpt2_repro.core.errors import raise_if_refused


@contextlib.contextmanager
def create_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that gets its name once it is complete.

    Its temporary name is unique, because the same task may run twice at once. Nothing waits for the disk: digests show
    what a loss of power destroyed.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as stream:
            yield stream
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_record(path: Path, record: Any) -> None:
    """Write a dataclass as JSON."""
    with create_file(path) as stream:
        stream.write(json.dumps(dataclasses.asdict(record)).encode())


def load_record(path: Path, kind: type) -> Any:
    """Read a dataclass `kind` that `save_record` wrote; `None` if the file is missing or damaged.

    Raises:
        RefusedError: the machine does not let it be read.
    """
    try:
        return kind(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise_if_refused(error, path)
        return None
