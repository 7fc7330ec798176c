"""Symbolic links in a run or data folder are kept; their targets are written and replaced."""

import atexit
import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import TINY, Case, answer, open_case, to_flags
from tiny_models import build_model

import eval_hellaswag
import prepare_data
import train
from modeling_gpt2_repro.__main__ import main as run_command
from modeling_gpt2_repro.training.metrics import read_metrics
from modeling_gpt2_repro.training.run_folder import RunFolder

# A constant learning rate, so the run can be extended, and all outputs of a run, so each of them is tested.
BEFORE = TINY | {"lr_schedule": "constant", "save_best": True, "report_to": "tensorboard"}
RUNS = {
    "new": BEFORE,
    "resume": BEFORE | {"max_steps": 4, "keep_checkpoints": 1},
    "never": BEFORE | {"max_steps": 1, "seed": 7, "resume_from_checkpoint": "never"},
}
RUN = RunFolder("run")
# The places of the links in one case, relative to the folder of the runs.
PLACES = {
    # The curves are not drawn here.
    "files of the run folder": [str(path) for path in (*RUN.files, *RUN.replaced_folders) if path != RUN.curves],
    "the run folder": ["run"],
    "the folder of the runs": ["."],
    "checkpoints": ["run/checkpoints/step_0000001", "run/checkpoints/step_0000002"],
    "files of checkpoints": [f"run/checkpoints/step_0000002/{name}" for name in ("training_state", "config.json")],
}
KINDS = ("another disk", "dangling", "relative", "dangling far")
EACH_KIND = pytest.mark.parametrize(
    "kind", [*KINDS[:2], *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[2:])]
)
PREPARE = {
    **{"files": "../given/corpus/a.jsonl", "tokenizer": "../given/tokenizer", "num_workers": 1},
    **{"val_tokens": 200, "shard_size": 900, "output_dir": "data"},
}


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A folder on another disk, if this machine has one."""
    memory = Path("/dev/shm")
    has_other = memory.is_dir() and memory.stat().st_dev != tmp_path.stat().st_dev
    with tempfile.TemporaryDirectory(dir=memory if has_other else tmp_path) as name:
        yield Path(name)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def put_link(path: Path, kind: str, case: Case, disk: Path) -> Path:
    """Replace a file or folder with a link of one of `KINDS`; return the link's target."""
    folder = disk if kind == "another disk" else case.folder / "cwd" / "elsewhere"
    target = folder / path.name / ("far/away" if kind == "dangling far" else "") / "there"
    destination = target.with_name("link") if kind == "relative" else target
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind != "dangling far":
        target.parent.mkdir(parents=True)
        (target.parent / "neighbour").write_text("somebody else's")
    if kind.startswith("dangling"):
        remove(path)
    elif path.exists():
        shutil.move(path, target)
    else:
        target.mkdir() if path.suffix in ("", ".partial") else target.touch()
    if kind == "relative":  # through a second link
        destination.symlink_to("there")
    path.symlink_to(os.path.relpath(destination, path.parent) if kind == "relative" else destination)
    return target


def check_links(links: dict[Path, Path]) -> None:
    """Check that links have kept their targets, and that nothing else at the target was removed."""
    for path, target in links.items():
        assert path.is_symlink() and Path(os.path.realpath(path)) == target
        assert "far" in target.parts or (target.parent / "neighbour").read_text() == "somebody else's"
        assert {each.name for each in target.parent.glob("*")} <= {"neighbour", "link", "there"}


def run(case: Case, operation: str) -> None:
    given = answer(train.main, to_flags(RUNS[operation]), case)
    assert given.code == 0, given.err


def describe_run(folder: Path) -> dict:
    """Return the contents of a run folder that do not depend on the clock or a tracker's names."""
    found = {}
    for parent, folders, files in os.walk(folder, followlinks=True):
        for path in (Path(parent, name) for name in (*folders, *files) if "events.out" not in name):
            if path.exists():
                is_weights = path.name == "model.safetensors"
                found[str(path.relative_to(folder))] = path.read_bytes() if is_weights else None
    lines = read_metrics(folder / "metrics.jsonl")
    found |= {"losses": [(line["step"], line.get("train/loss"), line.get("val/loss")) for line in lines]}
    found["log"] = (folder / "log.txt").read_text()
    found["status"] = json.loads((folder / "status.json").read_text())["status"]
    return found


@functools.cache
def build_finished_run() -> Path:
    """Build the folder of a run of two steps."""
    folder = Path(tempfile.mkdtemp(prefix="finished-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with open_case("data") as case:
        run(case, "new")
        return Path(shutil.copytree(case.folder / "cwd" / "runs", folder, dirs_exist_ok=True))


@functools.cache
def expect(operation: str, places: str, lacks: bool) -> dict:
    """Return the contents of a run folder without links after an operation; `lacks` first removes the places."""
    with open_case("data") as case:
        runs = case.folder / "cwd" / "runs"
        if operation != "new":
            shutil.copytree(build_finished_run(), runs)
        for place in PLACES[places] if lacks else ():
            if place != "run/checkpoints":
                remove(runs / place)
        run(case, operation)
        return describe_run(runs / "run")


@EACH_KIND
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("operation", RUNS)
def test_a_run(operation, places, kind, disk):
    if "checkpoints" in places and (operation == "new" or (operation == "resume" and kind.startswith("dangling"))):
        pytest.skip("there are no checkpoints, or not whole ones")
    with open_case("data") as case:
        runs = case.folder / "cwd" / "runs"
        if operation != "new":
            shutil.copytree(build_finished_run(), runs)
        lost = kind.startswith("dangling") and operation == "resume"
        links = {}
        for place in PLACES[places]:
            if not (lost and place == "run/checkpoints"):
                links[runs / place] = put_link(runs / place, kind, case, disk)
        run(case, operation)
        if places != "files of checkpoints":  # these are removed with their checkpoint
            check_links(links)
        have, want = describe_run(runs / "run"), expect(operation, places, lost)
        assert have == want


def test_a_linked_training_state_is_removed_and_its_model_kept(disk):
    with open_case("data") as case:
        runs = case.folder / "cwd" / "runs"
        shutil.copytree(build_finished_run(), runs)
        state = runs / "run" / "checkpoints" / "step_0000002" / "training_state"
        target = put_link(state, "another disk", case, disk)
        settings = RUNS["resume"] | {"keep_weights_every": 2}
        assert answer(train.main, to_flags(settings), case).code == 0
        assert (state.parent / "model.safetensors").exists() and not target.exists()


def test_a_linked_checkpoint_belongs_to_the_run(disk):
    with open_case("data") as case:
        runs = case.folder / "cwd" / "runs"
        shutil.copytree(build_finished_run(), runs)
        checkpoint = runs / "run" / "checkpoints" / "step_0000001"
        target = put_link(checkpoint, "another disk", case, disk)
        for path in (checkpoint, target):
            assert answer(train.main, to_flags(BEFORE | {"resume_from_checkpoint": path}), case).code == 0
            assert describe_run(runs / "run") == expect("new", "the run folder", False)


@pytest.mark.parametrize(
    ("name", "destination", "complaint"),
    [
        ("run", "run", "points to itself"),
        ("run", "../../given/corpus/a.jsonl/runs", "is not a folder"),
        ("run/checkpoints", "../../../given/corpus/a.jsonl/there", "is not a folder"),
        ("run/checkpoints", "../../gone", "restore it to resume"),
        ("run/checkpoints", "final", "replaced with it"),
        ("run/checkpoints/step_0000009", "step_0000009", "points to itself"),
        ("run/metrics.jsonl", "metrics.jsonl", "points to itself"),
        ("run/status.json", "/dev/null/there", "is not a folder"),
        ("run/log.txt", "samples.jsonl", "replaced with it"),
        ("run/best", "checkpoints/step_0000002", "replaced with it"),
        ("run/final", ".", "replaced with it"),
        ("run/final", "..", "replaced with it"),
        ("run/final", "/dev/shm", "is a mount point"),
        ("run/tensorboard", "/dev/null/there", "is not a folder"),
    ],
)
def test_unusable_links_are_reported(name, destination, complaint):
    with open_case("data", "corpus") as case:
        runs = case.folder / "cwd" / "runs"
        shutil.copytree(build_finished_run(), runs)
        remove(runs / name)
        (runs / name).symlink_to(destination)
        given = answer(train.main, to_flags(RUNS["resume"]), case, outputs=())
        assert given.code == 2 and f"runs/{name}" in given.err and complaint in given.err
        assert {path.name for path in runs.iterdir()} == {"run"}


@functools.cache
def build_shards() -> dict[str, bytes]:
    """Return the contents of a data folder without links."""
    with open_case("corpus", "tokenizer") as case:
        assert answer(prepare_data.main, to_flags(PREPARE), case).code == 0
        return read_shards(case.folder / "cwd" / "data")


def read_shards(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@EACH_KIND
@pytest.mark.parametrize(
    ("place", "operation"),
    [
        *(("data", operation) for operation in ("new", "again", "overwrite", "go on")),
        *(("data.partial", operation) for operation in ("new", "again", "overwrite", "go on")),
        *((f"data.partial/{name}", "go on") for name in ("unfinished", "plan.json", "lock")),
        *(("data/a_train_000001.npy", operation) for operation in ("again", "overwrite")),
    ],
)
def test_a_data_folder(place, operation, kind, disk):
    if kind.startswith("dangling") and "/" in place and place != "data.partial/lock":
        pytest.skip("what is lost makes the folder one of something else")
    with open_case("corpus", "tokenizer") as case, contextlib.chdir(case.folder / "cwd"):
        if operation == "go on":
            assert prepare_data.main(to_flags(PREPARE | {"stage": "tokenize"})) == 0
        elif operation != "new":
            assert prepare_data.main(to_flags(PREPARE)) == 0
        path = Path(place).absolute()
        target = put_link(path, kind, case, disk)
        settings = PREPARE | ({"overwrite": True} if operation == "overwrite" else {})
        assert prepare_data.main(to_flags(settings)) == 0
        assert read_shards(Path("data")) == build_shards()
        if place == "data":
            check_links({path: target})
        assert prepare_data.main(to_flags(PREPARE | {"verify": True})) == 0


def convert(argv: list[str]) -> int:
    return run_command(["convert", *argv])


@pytest.mark.parametrize(
    ("main", "flag", "given"),
    [
        (eval_hellaswag.main, "output", {"model": "../given/model", "data_file": "../given/items.jsonl"}),
        (eval_hellaswag.main, "per_example", {"model": "../given/model", "data_file": "../given/items.jsonl"}),
        (convert, "output_dir", {"checkpoint": "../given/ckpt.pt", "tokenizer": "../given/tokenizer"}),
        (prepare_data.main, "output_dir", PREPARE),
    ],
)
def test_a_result(main, flag, given, disk):
    with open_case("corpus", "tokenizer", "model", "items.jsonl") as case:
        torch.save(build_model(n_embd=64, n_head=1, vocab_size=257).state_dict(), case.given / "ckpt.pt")
        is_folder = flag == "output_dir"
        for number, kind in enumerate(KINDS):
            path = case.folder / "cwd" / f"result{number}{'' if is_folder else '.json'}"
            target = put_link(path, kind, case, disk)
            if main is convert and target.exists():
                target.rmdir()  # the output must not exist yet
            ended = answer(main, to_flags(given | {flag: path}), case)
            assert ended.code == 0, ended.err
            check_links({path: target})
            assert any(target.iterdir()) if is_folder else target.read_text()
        for name, destination in {"a": "a", "b": "/dev/null/there", "c": "../given/items.jsonl/there"}.items():
            path = case.folder / "cwd" / name
            path.symlink_to(destination)
            ended = answer(main, to_flags(given | {flag: path}), case)
            assert ended.code == 2 and str(path) in ended.err


def test_no_command_creates_a_folder_named_tilde(monkeypatch):
    with open_case("corpus", "tokenizer", "model", "items.jsonl") as case:
        monkeypatch.setenv("HOME", str(case.folder / "cwd"))
        for name in ("corpus", "tokenizer", "model", "items.jsonl"):
            (case.folder / "cwd" / name).symlink_to(case.given / name)
        prepare = PREPARE | {"files": "~/corpus/a.jsonl", "tokenizer": "~/tokenizer", "output_dir": "~/data"}
        training = BEFORE | {"data_dir": "~/data", "output_dir": "~/runs", "sequence_length": 64}
        training |= {
            "tokens_per_step": 128,
            "eval_tokens": 64,
            "hellaswag_every": 1,
            "hellaswag_file": "~/items.jsonl",
        }
        evaluation = {"model": "~/runs/run/final", "data_file": "~/items.jsonl", "output": "~/scores.json"}
        for main, argv in (
            (prepare_data.main, to_flags(prepare)),
            (train.main, to_flags(training)),
            (train.main, to_flags(training | {"resume": "~/runs/run/checkpoints/step_0000001", "run_name": "fork"})),
            (eval_hellaswag.main, to_flags(evaluation | {"per_example": "~/answers.jsonl"})),
            (run_command, ["plots", "~/runs/run", "~/runs/fork", "--output=~/curves.png"]),
            (run_command, ["summary", "~/runs/run"]),
            (run_command, ["sample", *to_flags({"model": "~/runs/run/final", "prompt": "~", "n_tokens": 4})]),
        ):
            given = answer(main, argv, case)
            assert given.code == 0, given.err
        made = {path.name for path in (case.folder / "cwd").iterdir() if not path.is_symlink()}
        assert made == {"data", "runs", "scores.json", "answers.jsonl", "curves.png"}
        assert answer(train.main, ["--config=~/runs/run/config.yaml"], case).code == 0
