"""The folder of a run: its files, its readers, and what remains after starting over or going back."""

import json

import pytest

from modeling_gpt2_repro.core.arguments import write_config
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    """The folder of a run of four steps with checkpoints at steps 2 and 4."""
    folder = RunFolder(tmp_path / "run")
    for path in (folder.final, folder.best, folder.tensorboard):
        path.mkdir(parents=True)
        (path / "file").write_text("x")
    for step in (2, 4):
        (folder.checkpoints / f"step_{step:07d}" / "training_state").mkdir(parents=True)
    lines = [{"step": step, "train/loss": 5.0 - step} for step in range(1, 5)]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder.samples.write_text("".join(json.dumps({"step": step, "text": "a"}) + "\n" for step in (2, 4)))
    folder.best_metrics.write_text(json.dumps({"step": 3, "val/loss": 2.5}))
    folder.status.write_text(json.dumps({"status": "finished", "step": 4}))
    write_config(TrainingConfig(run_name="run", seed=7), folder.config)
    return folder


def list_names(folder: RunFolder) -> set[str]:
    return {path.name for path in folder.path.iterdir()}


def test_every_file_in_the_folder_has_an_attribute(folder):
    folder.log.touch()
    folder.curves.touch()
    named = {path.name for path in vars(folder).values()}
    assert list_names(folder) <= named
    assert {path.name for path in (*folder.files, *folder.replaced_folders)} == list_names(folder)


def test_readers_return_what_was_written_up_to_a_step(folder):
    assert folder.read_config() == TrainingConfig(run_name="run", seed=7)
    assert [line["step"] for line in folder.read_metrics()] == [1, 2, 3, 4]
    assert [line["step"] for line in folder.read_metrics(up_to=2)] == [1, 2]
    assert [line["step"] for line in folder.read_samples()] == [2, 4]
    assert (folder.read_best_loss(3), folder.read_best_loss(2)) == (2.5, None)


def test_a_finished_model_counts_only_with_a_valid_status(folder):
    assert folder.get_finished_step() == 4
    folder.status.write_text('{"status": "finished", "step": "4"}')
    assert folder.get_finished_step() == 0
    folder.status.write_text('{"status": "running"}')
    assert folder.get_finished_step() == 0


def test_going_back_deletes_everything_later(folder):
    folder.go_back(2)
    assert [line["step"] for line in folder.read_metrics()] == [1, 2]
    assert [line["step"] for line in folder.read_samples()] == [2]
    assert folder.log.read_text() == "0 train 4.000000\n1 train 3.000000\n"
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step_0000002"]
    assert folder.final.is_dir()


@pytest.mark.parametrize("keeps_best", [True, False])
def test_starting_over_replaces_everything_but_the_settings(keeps_best, folder):
    folder.clear(keeps_best)
    assert list_names(folder) == {"config.yaml", "status.json", "checkpoints", *(["best"] if keeps_best else [])}
    assert not list(folder.checkpoints.iterdir())


def test_a_folder_that_is_not_a_run_is_not_replaced(folder):
    folder.check_replaceable()
    folder.config.unlink()
    with pytest.raises(UserError, match="is not a run folder"):
        folder.check_replaceable()
    for path in folder.replaced_files:
        path.unlink(missing_ok=True)
        path.touch()  # empty files, as behind links to another disk
    folder.clear(keeps_best=False)
    folder.check_replaceable()
