"""Checks before the first step."""

import pytest

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.training.preflight import check_disk, check_duration, estimate_disk_bytes, measure_folder


def test_disk_space_covers_the_kept_checkpoints_one_more_and_the_models():
    # 12 bytes per parameter in a checkpoint (weights and two moments), 4 in a model such as final/.
    assert estimate_disk_bytes(100, n_saves=20, keep_checkpoints=2) == 100 * (3 * 12 + 4)
    assert estimate_disk_bytes(100, n_saves=1, keep_checkpoints=2) == 100 * (12 + 4)
    assert estimate_disk_bytes(100, n_saves=20, keep_checkpoints=0) == 100 * (20 * 12 + 4)
    assert estimate_disk_bytes(100, n_saves=1, keep_checkpoints=2, n_models=3) == 100 * (12 + 4 * 4)


def test_the_size_of_a_folder_is_the_sum_of_its_files(tmp_path):
    assert measure_folder(tmp_path / "none") == 0
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"12345")
    assert measure_folder(tmp_path) == 5


def test_a_disk_that_is_too_small_is_reported_before_the_run(tmp_path):
    check_disk(tmp_path / "not" / "made" / "yet", 1000)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"needs up to 1000000\.0 GB .* --keep_checkpoints"):
        check_disk(tmp_path / "runs", 10**15)


def test_a_file_in_place_of_the_output_folder_is_reported(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        check_disk(tmp_path / "runs" / "mine", 0)


def test_more_than_a_week_on_a_cpu_needs_confirmation():
    week = 7 * 24 * 3600
    check_duration(week - 1, "cpu", is_accepted=False)
    check_duration(10 * week, "cuda", is_accepted=False)
    check_duration(10 * week, "cpu", is_accepted=True)
    with pytest.raises(UserError, match=r"about 70 days: add --yes"):
        check_duration(10 * week, "cpu", is_accepted=False)
