"""What is found out before the first step."""

import pytest

from modeling_gpt2_repro.errors import UserError
from modeling_gpt2_repro.training.preflight import check_disk, check_duration, estimate_disk_bytes


def test_disk_for_the_checkpoints_kept_one_more_and_the_final_model():
    # 12 bytes a parameter in a checkpoint (weights and two moments), 4 in final/.
    assert estimate_disk_bytes(100, keep_checkpoints=2, n_saves=20) == 100 * (3 * 12 + 4)
    assert estimate_disk_bytes(100, keep_checkpoints=2, n_saves=1) == 100 * (12 + 4)
    assert estimate_disk_bytes(100, keep_checkpoints=0, n_saves=20) == 100 * (20 * 12 + 4)
    assert estimate_disk_bytes(100, keep_checkpoints=2, n_saves=0) == 400


def test_too_small_a_disk_is_told_before_the_run(tmp_path):
    check_disk(tmp_path / "not" / "made" / "yet", 1000)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"needs up to 1000000\.0 GB .* --keep_checkpoints"):
        check_disk(tmp_path / "runs", 10**15)


def test_a_file_in_the_place_of_the_output_folder(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        check_disk(tmp_path / "runs" / "mine", 0)


def test_more_than_a_week_on_a_cpu_has_to_be_meant():
    week = 7 * 24 * 3600
    check_duration(week - 1, "cpu", is_accepted=False)
    check_duration(10 * week, "cuda", is_accepted=False)
    check_duration(10 * week, "cpu", is_accepted=True)
    with pytest.raises(UserError, match=r"about 70 days: --yes"):
        check_duration(10 * week, "cpu", is_accepted=False)
