"""The layout of contexts and endings in batches."""

import random

import pytest
import torch

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.evaluation.shared_context import (
    EncodedChoices,
    build_rows,
    collate_rows,
    is_truncated,
    plan_batches,
    truncate_context,
)

ITEM = EncodedChoices([10, 11, 12], [[20, 21, 22], [30], [40, 41], [50, 51]])
SHORT = EncodedChoices([13], [[60], [70, 71], [80], [90]])


def test_the_endings_of_an_item_follow_its_context_in_one_row():
    batch = collate_rows([ITEM, SHORT])
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 40, 50], [13, 70, 0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 3], [0, 1, 0, 0, 0, 0, 0]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 3, 4], [0, 2, -1, -1, -1, -1, -1]]
    assert not batch.is_plain


def test_every_token_of_an_ending_is_predicted_from_the_token_before_it():
    batch = collate_rows([ITEM, SHORT])
    assert batch.target_ids.tolist() == [20, 21, 22, 30, 40, 41, 50, 51, 60, 70, 71, 80, 90]
    assert batch.ending_lengths == [3, 1, 2, 2, 1, 2, 1, 1]
    # The last token of a context is the first place of its row, which all its endings share.
    assert [place.tolist() for place in batch.places] == [[0, 0, 0, 0, 0, 1, 1], [2, 3, 4, 5, 6, 0, 1]]
    before = batch.input_ids[batch.places][batch.target_places]
    assert before.tolist() == [12, 20, 21, 12, 12, 40, 12, 50, 13, 13, 70, 13, 13]


def test_a_token_attends_to_the_context_and_its_own_ending_up_to_itself():
    mask = collate_rows([ITEM, SHORT]).build_attention_mask(torch.float32, torch.device("cpu"))
    assert mask.shape == (2, 1, 7, 7)
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}
    visible = [[column for column in range(7) if mask[0, 0, row, column] == 0] for row in range(7)]
    assert visible == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 5], [0, 1, 2, 6]]
    # Padding attends to something, else its softmax is undefined.
    assert (mask[1, 0] == 0).any(dim=-1).all()


def test_separate_rows_need_no_mask():
    rows = build_rows(ITEM, max_positions=None, shares_context=False)
    assert [(row.context_ids, row.ending_ids) for row in rows] == [([10, 11, 12], [ids]) for ids in ITEM.ending_ids]
    assert collate_rows(rows).is_plain
    assert collate_rows(rows).ending_lengths == [3, 1, 2, 2]


def test_a_context_that_is_too_long_is_truncated_per_ending():
    assert not is_truncated(ITEM, 5)
    # The longest ending takes 2 of 4 positions, as its last token is only predicted.
    assert is_truncated(ITEM, 4)
    contexts = [row.context_ids for row in build_rows(ITEM, max_positions=4, shares_context=True)]
    assert contexts == [[11, 12], [10, 11, 12], [10, 11, 12], [10, 11, 12]]
    assert truncate_context([1, 2], [3, 4], max_positions=2) == [2]
    with pytest.raises(UserError, match="an ending of 3 tokens does not fit the model's 2 positions"):
        is_truncated(ITEM, 2)


def test_a_row_never_has_more_tokens_than_a_model_has_positions():
    assert build_rows(ITEM, max_positions=7, shares_context=True) == [ITEM]
    assert len(build_rows(ITEM, max_positions=6, shares_context=True)) == 4


def draw_items(n, seed=0):
    generator = random.Random(seed)
    lengths = [[generator.randint(1, 60), *(generator.randint(1, 30) for _ in range(4))] for _ in range(n)]
    return [EncodedChoices([1] * context, [[2] * ending for ending in endings]) for context, *endings in lengths]


@pytest.mark.parametrize("shares_context", [True, False])
def test_batches_contain_every_item_once_within_the_budget(shares_context):
    rows = [build_rows(item, 64, shares_context) for item in draw_items(300)]
    batches = plan_batches(rows, batch_tokens=1024)
    assert sorted(index for batch in batches for index in batch) == list(range(300))
    for batch in batches:
        assert collate_rows([row for index in batch for row in rows[index]]).input_ids.numel() <= 1024
    assert len(batches) < 300 / 3


def test_memory_scales_with_the_budget_and_work_with_the_items():
    def count_tokens(n):
        rows = [build_rows(item, None, shares_context=True) for item in draw_items(n)]
        sizes = [
            collate_rows([row for index in batch for row in rows[index]]).input_ids.numel()
            for batch in plan_batches(rows, batch_tokens=1024)
        ]
        return max(sizes), sum(sizes)

    (most, work), (most_of_more, work_of_more) = count_tokens(500), count_tokens(2000)
    assert most_of_more <= 1024 and most <= 1024
    assert 3.6 < work_of_more / work < 4.1
    # Hardly any of it is padding.
    assert work_of_more < 1.05 * sum(item.n_read for item in draw_items(2000))


def test_an_item_beyond_the_budget_forms_its_own_batch():
    rows = [build_rows(item, None, shares_context=True) for item in (SHORT, ITEM, SHORT)]
    assert plan_batches(rows, batch_tokens=4) == [[1], [0, 2]]
    assert plan_batches(rows, batch_tokens=1) == [[1], [0], [2]]
