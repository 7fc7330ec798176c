"""A run survives being killed at, or a failure of, any system call that changes a file."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from crashing import Crasher, CrashTests, Scenario, list_tree
from small_corpora import write_small_data
from tracing import Call

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.core.files import REPLACED_SUFFIX, TEMPORARY_SUFFIX
from modeling_gpt2_repro.training.checkpoint import check_whole, list_checkpoints, read_step

# The best model is that of step 4. At the end there are checkpoints of steps 4 and 6, and the model of step 2.
SETTINGS = {
    **{"n_layer": 1, "n_head": 1, "n_embd": 8, "sequence_length": 16, "tokens_per_step": 64, "max_steps": 8},
    **{"warmup_tokens": 64, "learning_rate": 3e-2, "mixed_precision": "no", "compile": "off", "eval_every": 2},
    **{"eval_tokens": 64, "hellaswag_every": 0, "sample_every": 4, "sample_tokens": 12, "sample_prompt": "The old"},
    **{"save_every": 2, "save_best": True, "keep_checkpoints": 1, "keep_weights_every": 4, "report_to": "none"},
}
TIMES = re.compile(r"tokens_per_second|mfu|seconds|memory")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def reference(forks, data, tmp_path_factory) -> Path:
    """The folder of an undisturbed run that keeps everything; `initial/` is the model of step 0."""
    folder = tmp_path_factory.mktemp("reference")
    for name, changes in (("run", {}), ("short", {"max_steps": 1, "learning_rate": 1e-30})):
        result = forks.run("train", list_flags(data, folder, run_name=name, keep_checkpoints=0, **changes), folder)
        assert result.code == 0, result.err
    shutil.copytree(folder / "short" / "best", folder / "run" / "initial")
    return folder / "run"


def list_flags(data: Path, folder: Path, run_name: str = "run", **changes) -> list[str]:
    settings = SETTINGS | {"data_dir": data, "output_dir": folder, "run_name": run_name} | changes
    return [f"--{name}={value}" for name, value in settings.items()]


def read_numbers(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [{name: value for name, value in line.items() if not TIMES.search(name)} for line in lines]
    return [line for line in lines if set(line) - {"step"}]


def read_weights(folder: Path) -> bytes | None:
    path = folder / "model.safetensors"
    return path.read_bytes() if path.exists() else None


def find_published(calls: list[Call], name: str) -> list[str]:
    """Return the matching names that these calls gave to files and folders, in order."""
    renamed = [call.paths[1] for call in calls if call.name.startswith("rename") and call.is_done]
    return [match[1] for path in renamed if (match := re.fullmatch(rf".*/run/({name})", path))]


def is_whole(checkpoint: Path) -> bool:
    try:
        check_whole(checkpoint)
    except UserError:
        return False
    return True


def check_best(reference: Path, run: Path, is_newest: bool = False) -> None:
    """Assert that the best model is one that the reference run had, or its last one."""
    step = json.loads((run / "best" / "metrics.json").read_text())["step"]
    expected = read_weights(reference / "checkpoints" / f"step_{step:07d}") or read_weights(reference / "initial")
    assert read_weights(run / "best") == expected, "the best model is lost"
    if is_newest:
        for name in ("metrics.json", "model.safetensors"):
            assert (run / "best" / name).read_bytes() == (reference / "best" / name).read_bytes(), f"{name} differs"


def check_kept(reference: Path, folder: Path, calls: list[Call]) -> None:
    run = folder / "run"
    steps = [int(name[-7:]) for name in find_published(calls, r"checkpoints/step_\d{7}")]
    whole = [read_step(path) for path in list_checkpoints(run / "checkpoints") if is_whole(path)]
    assert max(whole, default=0) >= max(steps, default=0), "the last checkpoint is lost"
    if find_published(calls, "best"):
        check_best(reference, run)
    if find_published(calls, "final"):
        assert read_weights(run / "final") == read_weights(reference / "final"), "the finished model is lost"
    for step in (step for step in steps if step % SETTINGS["keep_weights_every"] == 0):
        kept, expected = (each / "checkpoints" / f"step_{step:07d}" for each in (run, reference))
        assert read_weights(kept) == read_weights(expected), "kept weights are lost"


def check_end(reference: Path, expected_tree: list[str], folder: Path, was_killed: bool) -> None:
    run = folder / "run"
    assert read_numbers(run) == read_numbers(reference)
    for name in ("log.txt", "samples.jsonl", "final/model.safetensors"):
        assert (run / name).read_bytes() == (reference / name).read_bytes(), f"{name} differs"
    check_best(reference, run, is_newest=was_killed)  # a finished run does not need one that could not be written
    last = f"checkpoints/step_{SETTINGS['max_steps']:07d}"
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["step"]) == ("finished", SETTINGS["max_steps"]) and status["versions"]
    tree = sorted(list_tree(run))
    leftovers = [name for name in tree if name.endswith((TEMPORARY_SUFFIX, REPLACED_SUFFIX))]
    assert not leftovers
    if was_killed:
        assert tree == expected_tree
    for name in ("model.safetensors", "training_state/optimizer.pt"):
        if was_killed or (run / last).exists():  # a finished run does not need one that could not be written
            assert (run / last / name).read_bytes() == (reference / last / name).read_bytes(), f"{name} differs"


@pytest.fixture(scope="module")
def crasher(forks, data, reference, tmp_path_factory) -> Crasher:
    folder = tmp_path_factory.mktemp("run")
    undisturbed = folder / "here"
    undisturbed.mkdir()
    result = forks.run("train", list_flags(data, undisturbed), folder)
    assert result.code == 0, result.err
    expected_tree = sorted(list_tree(undisturbed / "run"))
    scenario = Scenario(
        "train",
        partial(list_flags, data),
        lambda folder: None,
        partial(check_kept, reference),
        partial(check_end, reference, expected_tree),
    )
    return Crasher(forks, scenario, folder)


class TestRun(CrashTests):
    share, at_least = 0.01, 300

    def test_the_trace_names_what_the_run_published(self, crasher):
        assert find_published(crasher.calls, r"checkpoints/step_\d{7}|best|final")[-1] == "final"
