"""The settings of a run, and what is derived from them."""

import pytest

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.training.config import FOREIGN_FLAGS, TrainingConfig


def test_the_defaults_reproduce_gpt2():
    config = TrainingConfig()
    assert config.windows_per_step == 512
    assert config.warmup_steps == 715
    # FineWeb-Edu's 10 B sample has 9.854 B tokens besides the validation shard of 0.1 B.
    assert config.derive_max_steps(n_windows=(9_854_000_000 - 1) // 1024) == 18_795


def test_steps_follow_from_epochs_unless_set():
    assert TrainingConfig(epochs=0.5).derive_max_steps(n_windows=51_200) == 50
    assert TrainingConfig(epochs=2).derive_max_steps(n_windows=51_300) == 200
    assert TrainingConfig(max_steps=7).derive_max_steps(n_windows=51_200) == 7
    with pytest.raises(UserError, match="do not fill one step of 512"):
        TrainingConfig().derive_max_steps(n_windows=511)


@pytest.mark.parametrize("n_processes, micro_batch_size", [(8, 64), (1, 64), (4, 64), (16, 32), (512, 1)])
def test_automatic_micro_batch_size_starts_at_64_and_falls(n_processes, micro_batch_size):
    sizes = TrainingConfig().list_micro_batch_sizes(n_processes, largest=64)
    assert sizes[0] == micro_batch_size
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1


def test_an_error_about_indivisible_batches_suggests_a_size_that_divides():
    with pytest.raises(UserError, match=r"40 does not divide the 64 .* use 32"):
        TrainingConfig(micro_batch_size="40").list_micro_batch_sizes(8, largest=64)
    with pytest.raises(UserError, match="among 6 processes: use 4"):
        TrainingConfig().list_micro_batch_sizes(6, largest=64)
    with pytest.raises(UserError, match="use 523,264"):
        TrainingConfig(tokens_per_step=524_000)


def test_evaluating_a_model_does_not_change_the_experiment_or_need_whole_steps():
    config = TrainingConfig(eval_only=True, init_from="gpt2", sequence_length=1000)
    assert "eval_only" not in config.experiment
    with pytest.raises(UserError, match="not a multiple of --sequence_length 1,000"):
        TrainingConfig(init_from="gpt2", sequence_length=1000)


def test_a_shuffled_corpus_is_permuted_from_the_second_epoch_on():
    assert TrainingConfig().first_permuted_epoch(is_shuffled=True) == 1
    assert TrainingConfig().first_permuted_epoch(is_shuffled=False) == 0
    assert TrainingConfig(shuffle_windows="on").first_permuted_epoch(is_shuffled=True) == 0
    assert TrainingConfig(shuffle_windows="off").first_permuted_epoch(is_shuffled=False) is None


def test_flags_of_other_projects_point_to_ours():
    ours = set(TrainingConfig.__dataclass_fields__)
    assert not ours & set(FOREIGN_FLAGS)
    for name in (
        "batch_size",
        "block_size",
        "max_iters",
        "eval_interval",
        "total_batch_size",
        "out_dir",
        "max_train_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "warmup_iters",
    ):
        assert any(f"--{setting}" in FOREIGN_FLAGS[name] for setting in ours), name
