"""Ranges of updates to skip."""

import pytest

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.training.skipping import merge_skips, parse_skips


def test_ranges_include_both_ends():
    assert [list(skip) for skip in parse_skips(["3:5", "9:9"])] == [[3, 4, 5], [9]]


@pytest.mark.parametrize("text", ["5", "5:4", "0:3", ":", "a:b", "1:2:3", "-1:2", "1:" + "9" * 99])
def test_anything_but_a_range_is_rejected(text):
    with pytest.raises(UserError, match="must be A:B"):
        parse_skips([text])


def test_a_resumed_run_merges_old_and_new_ranges():
    saved = parse_skips(["3:5"])
    assert merge_skips(saved, [], first_step=10) == saved
    assert merge_skips(saved, parse_skips(["3:5", "12:12"]), first_step=10) == [range(3, 6), range(12, 13)]
    with pytest.raises(UserError, match="already includes updates up to 10"):
        merge_skips(saved, parse_skips(["7:12"]), first_step=10)
