"""Shared contexts: a context and its competing endings packed into one row, so that the context is computed once.

A row is the context followed by the endings:

    context  ending 0  ending 1  ending 2  ending 3
    0 1 2 3  4 5 6     4 5       4 5 6 7   4         positions

Positions restart with each ending and a mask hides the endings from each other, so each is scored as if it alone
followed the context. The last token of an ending is only predicted, never read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from ..core.errors import UserError


@dataclass(frozen=True)
class EncodedChoices:
    """Token ids of a context and its competing endings: an item, or a row of a batch."""

    context_ids: list[int]
    ending_ids: list[list[int]]

    @property
    def n_read(self) -> int:
        """Input tokens if the context and all endings are packed into one row."""
        return len(self.context_ids) + sum(len(ids) - 1 for ids in self.ending_ids)

    @property
    def n_read_of_longest(self) -> int:
        """Input tokens of the context with its longest ending."""
        return len(self.context_ids) + max(map(len, self.ending_ids)) - 1


def truncate_context(context_ids: list[int], ending_ids: list[int], max_positions: int | None) -> list[int]:
    """Truncate a context on the left until it and the ending fit the model.

    `max_positions + 1` tokens fit, because the last one is only predicted, never read.

    Raises:
        UserError: the ending alone does not fit.
    """
    if max_positions is None:
        return context_ids
    room = max_positions + 1 - len(ending_ids)
    if room < 1:
        raise UserError(f"an ending of {len(ending_ids)} tokens does not fit the model's {max_positions} positions")
    return context_ids[-room:]


def is_truncated(item: EncodedChoices, max_positions: int | None) -> bool:
    """Return whether any ending requires truncating the context."""
    return any(
        len(truncate_context(item.context_ids, ids, max_positions)) < len(item.context_ids) for ids in item.ending_ids
    )


def fits_in_one_row(item: EncodedChoices, max_positions: int | None) -> bool:
    """Return whether an item packed into one row has no more tokens than `max_positions`.

    Its positions restart and end earlier, but some models limit the number of tokens.
    """
    return max_positions is None or item.n_read <= max_positions


def build_rows(item: EncodedChoices, max_positions: int | None, shares_context: bool) -> list[EncodedChoices]:
    """Return the rows of an item: a single shared one, or one per ending, in order.

    A context that is too long cannot be shared, because each ending truncates it differently.
    """
    if shares_context and fits_in_one_row(item, max_positions):
        return [item]
    return [EncodedChoices(truncate_context(item.context_ids, ids, max_positions), [ids]) for ids in item.ending_ids]


def plan_batches(rows_by_item: Sequence[Sequence[EncodedChoices]], batch_tokens: int) -> list[list[int]]:
    """Group item indices, longest first, into batches of at most `batch_tokens` tokens, including padding.

    The rows of an item stay together; an item that exceeds the budget gets its own batch. The plan depends only on
    rows and budget, so batches, and hence scores, are the same for any number of processes.
    """
    widths = [max(row.n_read for row in rows) for rows in rows_by_item]
    batches: list[list[int]] = []
    used, limit = 0, 0
    for index in sorted(range(len(widths)), key=lambda index: (-widths[index], index)):
        n_rows = len(rows_by_item[index])
        if not batches or used + n_rows > limit:
            batches.append([])
            # The first item of a batch is its longest, and all later rows are padded to its width.
            used, limit = 0, batch_tokens // widths[index]
        batches[-1].append(index)
        used += n_rows
    return batches


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, padded on the right. A place is a (row, column) from which a token of an ending is predicted.

    Attributes:
        input_ids, position_ids: (rows, width).
        segments: (rows, width), 0 in the context, i + 1 in ending i, -1 in the padding.
        is_plain: no row has more than one ending, so plain causal attention suffices.
        places: rows and columns of the places, (places,) each.
        target_places: (targets,) indices into `places`; all endings of a row share the place of the context's last
            token.
        target_ids: (targets,), the tokens of all endings of all rows, in order.
        ending_lengths: the number of targets of each ending.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor
    is_plain: bool
    places: tuple[torch.Tensor, torch.Tensor]
    target_places: torch.Tensor
    target_ids: torch.Tensor
    ending_lengths: list[int]

    def build_attention_mask(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return the additive attention mask (rows, 1, width, width): 0 where a token may attend, else the minimum.

        The mask is not boolean, because some attention implementations silently misinterpret boolean masks.
        """
        segments = self.segments.to(device)
        keys, queries = segments.unsqueeze(1), segments.unsqueeze(2)
        width = segments.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        is_visible = causal & ((keys == 0) | (keys == queries))
        mask = torch.zeros(is_visible.shape, dtype=dtype, device=device)
        return mask.masked_fill_(~is_visible, torch.finfo(dtype).min).unsqueeze(1)


def collate_rows(rows: Sequence[EncodedChoices]) -> Batch:
    """Collate rows into tensors on the CPU."""
    input_ids: list[torch.Tensor] = []
    position_ids: list[torch.Tensor] = []
    segments: list[torch.Tensor] = []
    columns: list[int] = []
    target_places: list[int] = []
    target_ids: list[int] = []
    for row in rows:
        n_context = len(row.context_ids)
        ids, positions, segment = list(row.context_ids), list(range(n_context)), [0] * n_context
        last_of_context = len(columns)
        for number, ending_ids in enumerate(row.ending_ids, start=1):
            n_read = len(ending_ids) - 1
            first = last_of_context + 1 + len(ids) - n_context
            target_places += [last_of_context, *range(first, first + n_read)]
            target_ids += ending_ids
            ids += ending_ids[:-1]
            positions += range(n_context, n_context + n_read)
            segment += [number] * n_read
        columns += range(n_context - 1, len(ids))
        input_ids.append(torch.tensor(ids))
        position_ids.append(torch.tensor(positions))
        segments.append(torch.tensor(segment))
    n_places = torch.tensor([row.n_read - len(row.context_ids) + 1 for row in rows])
    return Batch(
        input_ids=pad_sequence(input_ids, batch_first=True),
        position_ids=pad_sequence(position_ids, batch_first=True),
        segments=pad_sequence(segments, batch_first=True, padding_value=-1),
        is_plain=all(len(row.ending_ids) == 1 for row in rows),
        places=(torch.arange(len(rows)).repeat_interleave(n_places), torch.tensor(columns)),
        target_places=torch.tensor(target_places),
        target_ids=torch.tensor(target_ids),
        ending_lengths=[len(ids) for row in rows for ids in row.ending_ids],
    )
