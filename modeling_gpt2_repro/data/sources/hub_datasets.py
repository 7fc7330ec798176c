"""Streaming datasets from the Hub, or from a local folder that `datasets` can load. A task is one file.

Only the text column of a parquet file is fetched. Nothing but the dataset card is written to disk.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Generator, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.dataset

from ...core.errors import UserError
from ...core.hub_client import describe_hub_failure
from .local_files import BATCH_ROWS, as_texts

# `huggingface_hub` retries a request for about 25 seconds, and `datasets` retries that 20 times by default. An outage
# would be reported after ten minutes, although a hiccup of the Hub is over in one.
READ_TRIES = 2
SECONDS_BETWEEN_TRIES = 5
# Read-ahead of a request to a parquet file. It spans the gap between the texts of consecutive row groups in a text
# corpus, which one request then serves, and wastes little if other columns are large.
READ_AHEAD_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class HubTask:
    """One file of a dataset.

    Attributes:
        name: the task's name for messages.
        rows: the file's rows, a `datasets.IterableDataset`.
    """

    name: str
    rows: Any
    text_column: str

    def read_batches(self) -> Iterator[pa.LargeStringArray]:
        """Yield the texts of the file's rows in order.

        Raises:
            UserError: all retries failed, or the file cannot be read.
        """
        _prepare_datasets()
        with _explained(self.name):
            for table in self.rows.with_format("arrow").iter(batch_size=BATCH_ROWS):
                for chunk in table[self.text_column].chunks:
                    yield as_texts(chunk, self.name)


def list_hub_tasks(
    name: str, config: str | None, split: str, revision: str | None, text_column: str
) -> Iterator[HubTask]:
    """Open a dataset and return its tasks in the order of its files.

    Args:
        revision: the commit; `None` for a local folder.

    Raises:
        UserError: the dataset, config, split or column is missing or private, or the Hub failed.
    """
    datasets = _prepare_datasets()
    what = f"the dataset {name!r}"
    with _explained(what, hint="--dataset_config_name"):
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        if builder.name == "cache":
            # If the Hub fails, `datasets` silently uses its cache, even of another revision.
            raise ConnectionError("only a copy in the cache of `datasets` is available")
    with _explained(what, hint="--split"):
        dataset = builder.as_streaming_dataset(split=split)
        columns = dataset.column_names or list(next(iter(dataset), {}))
        if text_column not in columns:
            raise UserError(f"{what} has no column {text_column!r}: give --text_column one of {', '.join(columns)}")
        if builder.name == "parquet":
            # `select_columns` drops the other columns only after fetching them.
            builder.config.columns = [text_column]
            builder.config.batch_size = BATCH_ROWS
            # Arrow's own read-ahead keeps its buffers until the file ends: a worker would have all of it in memory.
            builder.config.fragment_scan_options = pa.dataset.ParquetFragmentScanOptions(pre_buffer=False)
            builder.storage_options = {"hf": {"block_size": READ_AHEAD_BYTES}}
            datasets.streaming.extend_dataset_builder_for_streaming(builder)  # otherwise the options are ignored
            dataset = builder.as_streaming_dataset(split=split)
        else:
            dataset = dataset.select_columns([text_column])
    files = builder.config.data_files.get(split, [])
    return _cut_into_files(dataset, what, files, text_column)


def _cut_into_files(dataset: Any, what: str, files: list[str], text_column: str) -> Iterator[HubTask]:
    count = dataset.num_shards
    for index in range(count):
        file = files[index].rpartition("@")[2].partition("/")[2] if len(files) == count else ""
        name = f"{what}, file {index + 1} of {count}" + (f" ({file})" if file else "")
        yield HubTask(name, dataset.shard(num_shards=count, index=index), text_column)


def _prepare_datasets() -> Any:
    """Import `datasets`, with fewer retries and without logging: our errors include what it would log."""
    import datasets.config  # here, because it takes half a second that local files need not wait for

    config: Any = datasets.config
    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = READ_TRIES
    config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = SECONDS_BETWEEN_TRIES
    config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = SECONDS_BETWEEN_TRIES
    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


@contextlib.contextmanager
def _explained(what: str, hint: str = "") -> Generator[None]:
    """Convert errors in the context to a `UserError` about `what`.

    Readers of a dozen formats and an HTTP library raise their own exceptions; all are converted except types that
    indicate a bug.

    Args:
        hint: the flag to mention for a plain ValueError, which `datasets` raises for invalid arguments.
    """
    try:
        yield
    except (UserError, MemoryError, AssertionError, AttributeError, NameError, TypeError):
        raise
    except Exception as error:
        if failure := describe_hub_failure(error):
            raise UserError(f"{what}: {failure}") from error
        message = f"cannot read {what}: {error or type(error).__name__}"
        raise UserError(f"{message} (see {hint})" if hint and type(error) is ValueError else message) from error
