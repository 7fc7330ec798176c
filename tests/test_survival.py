"""Runs that are stopped, killed or damaged, and resume to exactly the same result."""

import dataclasses
import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file
from small_runs import N_STEPS, flags, launch, list_launch_command, read_losses, read_series, run_training

import train
from modeling_gpt2_repro.configuration_gpt2_repro import MODEL_SIZES
from modeling_gpt2_repro.core import files, locks
from modeling_gpt2_repro.core.files import compute_checksum
from modeling_gpt2_repro.core.stop_signals import STOP_SIGNALS
from modeling_gpt2_repro.training import preemption
from modeling_gpt2_repro.training.checkpoint import load_state
from modeling_gpt2_repro.training.record import RunRecord

N_KILLS = 20
# Training only: the state that has to survive is in the checkpoints and in metrics.jsonl.
BARE = {"eval_every": 0, "hellaswag_every": 0, "sample_every": 0}


@pytest.fixture(scope="module")
def whole_run(shards, tmp_path_factory) -> Path:
    """An undisturbed run."""
    return run_training(shards, tmp_path_factory.mktemp("whole"), save_every=3)


def assert_same_end(run: Path, expected: Path) -> None:
    """Assert that two runs have the same metrics, once per step, and the same weights, bit for bit."""
    for name in ("train/loss", "train/grad_norm", "val/loss", "hellaswag/acc_norm"):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if name in line]
        assert steps == sorted(set(steps))
        assert read_series(run, name) == read_series(expected, name), name
    for name in ("log.txt", "samples.jsonl"):
        ours, theirs = ((folder / name) for folder in (run, expected))
        assert ours.exists() == theirs.exists()
        assert not ours.exists() or ours.read_text() == theirs.read_text()
    weights = [load_file(folder / "final" / "model.safetensors") for folder in (run, expected)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def read_status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def stop_at(monkeypatch, update: int, *signals: signal.Signals) -> None:
    """Send this process signals when it logs an update."""
    log = RunRecord.log

    def log_and_stop(self, step, metrics):
        log(self, step, metrics)
        if step == update and "train/loss" in metrics:
            for number in signals:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(RunRecord, "log", log_and_stop)


@pytest.mark.parametrize("number, update", [(signal.SIGTERM, 4), (signal.SIGINT, 6)])
def test_a_stopped_run_saves_and_resumes(shards, tmp_path, monkeypatch, capsys, whole_run, number, update):
    handlers = [signal.getsignal(each) for each in STOP_SIGNALS]
    with monkeypatch.context() as patch:
        stop_at(patch, update, number)
        assert train.main(flags(shards, tmp_path, save_every=0)) == 75
    run = tmp_path / "run"
    assert read_status(run) == {"status": "preempted", "step": update}
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{update:07d}"]
    assert "the same command resumes from the last checkpoint" in capsys.readouterr().out
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == handlers
    assert update not in read_series(run, "val/loss")  # stopping does not wait for an evaluation
    run_training(shards, tmp_path, save_every=0)
    assert_same_end(run, whole_run)
    assert read_status(run).items() >= {"status": "finished", "step": N_STEPS}.items()


@pytest.mark.parametrize("number", sorted(set(STOP_SIGNALS) - {signal.SIGTERM, signal.SIGINT}))
def test_every_stop_signal_saves_a_checkpoint(shards, tmp_path, monkeypatch, number):
    stop_at(monkeypatch, 2, number)
    assert train.main(flags(shards, tmp_path, **BARE, save_every=0, max_steps=4)) == 75
    assert read_status(tmp_path / "run") == {"status": "preempted", "step": 2}
    assert (tmp_path / "run" / "checkpoints" / "step_0000002").is_dir()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(shards, tmp_path, monkeypatch, number):
    """As under `nohup`, or in the background of a shell."""
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        stop_at(monkeypatch, 2, number)
        run = run_training(shards, tmp_path, **BARE, save_every=0, max_steps=4)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, previous)
    assert read_status(run)["status"] == "finished"


def test_a_run_terminated_during_setup_records_it(shards, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text('{"status": "preempted", "step": 4}')
    monkeypatch.setattr(
        "modeling_gpt2_repro.training.run.fit_to_device", lambda *_: os.kill(os.getpid(), signal.SIGUSR1)
    )
    with pytest.raises(SystemExit) as caught:
        train.main(flags(shards, tmp_path, **BARE))
    assert caught.value.code == 128 + signal.SIGUSR1
    assert read_status(tmp_path / "run") == {"status": "failed", "error": "Terminated: SIGUSR1"}


def test_status_tells_whether_the_process_of_a_run_is_alive(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.1)
    states = []
    log = RunRecord.log

    def log_and_look(self, step, metrics):
        log(self, step, metrics)
        states.append(read_status(tmp_path / "run"))
        time.sleep(0.4)  # a heartbeat is written in whole seconds

    monkeypatch.setattr(RunRecord, "log", log_and_look)
    run = run_training(shards, tmp_path, **BARE, save_every=0, max_steps=4)
    for state in states:
        assert (state["status"], state["host"], state["process_id"]) == ("running", os.uname().nodename, os.getpid())
    beats = [datetime.fromisoformat(state["heartbeat"]) for state in states]
    assert beats[0] < beats[-1] and abs(time.time() - beats[-1].timestamp()) < 30
    assert read_status(run)["status"] == "finished" and not (run / "lock").exists()


def test_a_run_whose_folder_was_taken_over_stops_writing(shards, tmp_path, monkeypatch, capsys):
    """As after a suspension so long that another machine considers it dead."""
    log = RunRecord.log

    def log_and_lose(self, step, metrics):
        if step == 4:
            (tmp_path / "run" / "lock").unlink()
            holder = locks.Holder("node7", "another boot", 123, time.time(), time.time())
            (tmp_path / "run" / "lock").write_text(json.dumps(dataclasses.asdict(holder)))
        log(self, step, metrics)

    monkeypatch.setattr(RunRecord, "log", log_and_lose)
    assert train.main(flags(shards, tmp_path, **BARE, save_every=1)) == 2
    assert "was taken over by process 123 on node7" in capsys.readouterr().err
    run = tmp_path / "run"
    assert list(read_losses(run)) == [1, 2, 3] and not list((run / "checkpoints").glob("*4"))
    assert read_status(run)["status"] == "running" and (run / "lock").exists()


def test_a_second_signal_stops_immediately(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "SECONDS_OF_ONE_REQUEST", 0.0)
    stop_at(monkeypatch, 4, signal.SIGINT, signal.SIGINT)
    assert train.main(flags(shards, tmp_path, save_every=0)) == 130
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert read_status(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize("owner, name", [(train, "write_final"), (RunRecord, "close")])
def test_a_request_after_the_last_step_lets_the_run_finish(shards, tmp_path, monkeypatch, whole_run, owner, name):
    action = getattr(owner, name)

    def act_when_asked_to_stop(*arguments):
        signal.raise_signal(signal.SIGTERM)
        action(*arguments)

    monkeypatch.setattr(owner, name, act_when_asked_to_stop)
    assert train.main(flags(shards, tmp_path)) == 0
    assert read_status(tmp_path / "run")["status"] == "finished"
    assert_same_end(tmp_path / "run", whole_run)


def test_signals_repeated_by_the_system_count_once(shards, tmp_path, monkeypatch):
    """Such as SIGXCPU, which is sent every second, and the warning of a batch system before SIGTERM."""
    monkeypatch.setattr(preemption, "SECONDS_OF_ONE_REQUEST", 0.0)
    stop_at(monkeypatch, 4, signal.SIGXCPU, signal.SIGXCPU, signal.SIGUSR1, signal.SIGTERM)
    assert train.main(flags(shards, tmp_path, save_every=0)) == 75
    assert (tmp_path / "run" / "checkpoints" / "step_0000004").is_dir()


def test_simultaneous_signals_are_one_request(shards, tmp_path, monkeypatch):
    # A batch system signals every process, and the launcher passes the signal on.
    stop_at(monkeypatch, 4, signal.SIGTERM, signal.SIGTERM, signal.SIGINT)
    assert train.main(flags(shards, tmp_path, save_every=0)) == 75
    assert (tmp_path / "run" / "checkpoints" / "step_0000004").is_dir()


def test_a_command_that_starts_over_is_not_suggested_for_resuming(shards, tmp_path, monkeypatch, capsys):
    """It would delete the checkpoints once more."""
    anew = {**BARE, "save_every": 3, "resume_from_checkpoint": "never"}
    way = "the same command with --resume_from_checkpoint auto resumes from the last checkpoint"
    with monkeypatch.context() as patch:
        stop_at(patch, 4, signal.SIGTERM)
        assert train.main(flags(shards, tmp_path, **anew)) == 75
    assert f": {way}" in capsys.readouterr().out
    # Nor does it suggest going back to a checkpoint, if the disk is full at the end or when asked to stop.
    (own,) = (tmp_path / "run" / "checkpoints").glob("*4")
    disk_full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_published_model", mock.Mock(side_effect=disk_full))
        assert train.main(flags(shards, tmp_path, **anew | {"resume_from_checkpoint": own})) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and f": {way}" in error
    with monkeypatch.context() as patch:
        stop_at(patch, 5, signal.SIGTERM)
        patch.setattr(train.checkpoints, "save_checkpoint", mock.Mock(side_effect=disk_full))
        assert train.main(flags(shards, tmp_path, **anew | {"resume_from_checkpoint": own})) == 2
    assert f"could not save a checkpoint: {way}" in capsys.readouterr().err


def test_a_stopped_smoke_test_offers_no_resume(shards, tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, 4, signal.SIGTERM)
    assert train.main([*flags(shards, tmp_path), "--smoke"]) == 130
    out = capsys.readouterr().out
    assert "the smoke test was stopped after 4 steps" in out and "resumes from" not in out
    assert list(tmp_path.iterdir()) == []


def wait_for_update(run: Path, update: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and f'"step": {update}' in (run / "metrics.jsonl").read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"no update {update} in {seconds} s")


def find_workers(launcher: subprocess.Popen) -> list[psutil.Process]:
    """Return the processes that run train.py under a launcher."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    return [child for child in children if any(part.endswith("/train.py") for part in child.cmdline())]


def wait_for_end(processes: list[psutil.Process], seconds: float = 60) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        process.kill()
    assert not alive, "some processes did not end"


def start(n_processes: int, argv: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        list_launch_command(n_processes, argv), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


LONG = {**BARE, "max_steps": 80, "save_every": 0, "learning_rate": 1e-3, "micro_batch_size": 2}


# Some batch systems signal only one of the processes; here in the third update.
STOP_ONE = """
import signal
update, steps = module.update, []
def update_and_stop(*arguments):
    steps.append(len(steps))
    if os.environ["RANK"] == "1" and len(steps) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return update(*arguments)
module.update = update_and_stop
assert module.main(run["argv"]) == 75
"""


def test_two_processes_stop_at_the_same_step(shards, tmp_path, forks):
    result = forks.launch(2, "train", flags(shards, tmp_path, **LONG), tmp_path, STOP_ONE)
    assert result.code == 0, result.err
    run = tmp_path / "run"
    status = read_status(run)
    step = status["step"]
    assert status["status"] == "preempted" and 3 <= step < 80
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{step:07d}"]


@pytest.mark.parametrize("number", [signal.SIGHUP, pytest.param(signal.SIGQUIT, marks=pytest.mark.slow)])
def test_torchrun_passes_a_terminals_signals_to_its_workers_which_save(shards, tmp_path, number):
    """The workers are in sessions of their own, so that the terminal does not reach them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    argv = flags(shards, tmp_path, **LONG | {"max_steps": 2000})
    with subprocess.Popen([*command, str(REPOSITORY / "train.py"), *argv], stderr=subprocess.PIPE) as launcher:
        wait_for_update(tmp_path / "run", 3)
        launcher.send_signal(number)
        launcher.communicate()
    status = read_status(tmp_path / "run")
    assert status["status"] == "preempted"
    assert (tmp_path / "run" / "checkpoints" / f"step_{status['step']:07d}").is_dir()


@pytest.mark.slow
def test_two_stopped_processes_resume_to_the_same_result(shards, tmp_path, forks):
    test_two_processes_stop_at_the_same_step(shards, tmp_path, forks)
    for name in ("run", "whole"):
        result = launch(2, flags(shards, tmp_path, name, **LONG))
        assert result.returncode == 0, result.stderr
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_a_worker_stops_when_its_launcher_is_killed(shards, tmp_path):
    with start(1, flags(shards, tmp_path, **BARE, max_steps=2000, save_every=0)) as launcher:
        wait_for_update(tmp_path / "run", 3)
        (worker,) = find_workers(launcher)
        launcher.kill()
        launcher.communicate()
        wait_for_end([worker])
    status = read_status(tmp_path / "run")
    assert status["status"] == "preempted"
    assert (tmp_path / "run" / "checkpoints" / f"step_{status['step']:07d}").is_dir()


def test_when_one_process_is_killed_the_other_ends(shards, tmp_path):
    with start(2, flags(shards, tmp_path, **BARE, max_steps=2000, save_every=2, micro_batch_size=2)) as launcher:
        wait_for_update(tmp_path / "run", 3)
        workers = find_workers(launcher)
        workers[1].kill()
        wait_for_end(workers)
        launcher.communicate(timeout=60)
        assert launcher.returncode != 0
    assert (tmp_path / "run" / "checkpoints" / "step_0000002").is_dir()


def count_updates(run: Path) -> int:
    return max(read_losses(run), default=0) if (run / "metrics.jsonl").exists() else 0


@pytest.mark.slow
def test_a_run_killed_many_times_ends_with_the_same_weights(shards, tmp_path):
    """`kill -9` at random moments while it starts, trains and saves."""
    settings = {**BARE, "max_steps": 12 * N_KILLS, "save_every": 2, "keep_checkpoints": 2, "learning_rate": 1e-3}
    expected = run_training(shards, tmp_path, "whole", **settings)
    # Forks of a process that has imported everything but computed nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "train"])
    run, chance, reached = tmp_path / "run", random.Random(0), []
    for kill in range(N_KILLS):
        process = context.Process(target=train.main, args=(flags(shards, tmp_path, **settings),))
        before = count_updates(run)
        process.start()
        if kill % 2:  # while it starts
            process.join(chance.uniform(0, 2))
        else:  # while it trains, and saves every other update
            wait_for_update(run, before + 1)
            process.join(chance.uniform(0, 0.05))
        assert process.exitcode != 1, "the run failed on its own"
        if process.exitcode is not None:  # on a fast machine the run may finish first
            break
        process.kill()
        process.join()
        reached.append(count_updates(run))
    run_training(shards, tmp_path, **settings)
    assert len(reached) >= 2 and 0 < max(reached) < settings["max_steps"]
    assert_same_end(run, expected)
    assert not list((run / "checkpoints").glob("*.partial"))


def test_a_run_started_from_another_runs_checkpoint_resumes_from_its_own(
    shards, tmp_path, monkeypatch, capsys, whole_run
):
    fork = {**BARE, "save_every": 3, "resume_from_checkpoint": whole_run / "checkpoints" / "step_0000003"}
    with monkeypatch.context() as patch:
        stop_at(patch, 7, signal.SIGTERM)
        assert train.main(flags(shards, tmp_path, **fork)) == 75
    assert ": the same command resumes from the last checkpoint" in capsys.readouterr().out
    own = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in own.iterdir()) == ["step_0000006", "step_0000007"]
    # With the other run's id, a tracker would write into that run.
    tracker_run_id = load_state(own / "step_0000007").tracker_run_id
    assert tracker_run_id != load_state(fork["resume_from_checkpoint"]).tracker_run_id
    capsys.readouterr()

    run = run_training(shards, tmp_path, **fork)
    out = capsys.readouterr().out
    assert "which is newer than" in out and "from step 7" in out
    assert load_state(own / "step_0000012").tracker_run_id == tracker_run_id
    assert read_losses(run) == {step: loss for step, loss in read_losses(whole_run).items() if step > 3}
    run_training(shards, tmp_path, **fork)
    assert "is finished" in capsys.readouterr().out
    shutil.rmtree(own)
    assert train.main(flags(shards, tmp_path, **fork)) == 2
    assert "contains a finished run" in capsys.readouterr().err


def damage(kind: str, checkpoint: Path) -> None:
    weights, state = checkpoint / "model.safetensors", checkpoint / "training_state"
    if kind == "truncated weights":
        os.truncate(weights, weights.stat().st_size // 2)
    elif kind == "flipped bit":
        content = bytearray((state / "optimizer.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (state / "optimizer.pt").write_bytes(content)
    elif kind == "missing file":
        (state / "state.json").unlink()
    elif kind == "foreign file":
        (checkpoint / "notes.txt").write_text("mine")
    elif kind == "empty checksums":
        (state / "checksums.json").write_text("")
    elif kind == "names that leave the folder":
        checksums = json.loads((state / "checksums.json").read_text())
        (state / "checksums.json").write_text(json.dumps(checksums | {"../../../secret": "sha256:0"}))


@pytest.mark.parametrize(
    "kind",
    [
        "truncated weights",
        "flipped bit",
        "missing file",
        "foreign file",
        "empty checksums",
        "names that leave the folder",
    ],
)
def test_a_damaged_checkpoint_is_skipped(shards, tmp_path, whole_run, capsys, kind):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    shutil.rmtree(run / "final")
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 12, "train/lo\n\x00garbage\n[1]\n')
    newest = run / "checkpoints" / "step_0000012"
    damage(kind, newest)
    assert train.main(flags(shards, tmp_path, save_every=3, resume_from_checkpoint=newest)) == 2
    assert "is damaged" in capsys.readouterr().err
    run_training(shards, tmp_path, save_every=3)
    out = capsys.readouterr().out
    assert "skipped a checkpoint" in out and "step_0000012 is damaged" in out and "from step 9" in out
    assert_same_end(run, whole_run)


def test_a_finished_model_is_kept_until_another_one_replaces_it(shards, tmp_path, whole_run, monkeypatch):
    """Here the last checkpoint is missing, so the same command repeats the last steps."""
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    shutil.rmtree(run / "checkpoints" / f"step_{N_STEPS:07d}")
    before, seen = (run / "final" / "model.safetensors").stat(), []
    update = train.update
    monkeypatch.setattr(
        train, "update", lambda *run_: seen.append((run / "final" / "model.safetensors").stat()) or update(*run_)
    )
    run_training(shards, tmp_path, save_every=3)
    assert seen == [before] * 3 and (run / "final" / "model.safetensors").stat() != before
    assert_same_end(run, whole_run)


def test_a_finished_run_without_its_status_gets_it_when_started_again(shards, tmp_path, whole_run):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    expected = read_status(run)
    (run / "status.json").write_text('{"status": "running"}')
    (run / "best.partial").mkdir()
    run_training(shards, tmp_path, save_every=3)
    assert read_status(run) == expected and not (run / "best.partial").exists()


def test_the_best_model_of_repeated_steps_is_kept_until_another_one_replaces_it(shards, tmp_path, monkeypatch):
    settings = {**BARE, "save_every": 4, "eval_every": 2, "save_best": True}
    run = run_training(shards, tmp_path, **settings, max_steps=6)
    best = json.loads((run / "best" / "metrics.json").read_text())
    assert best["step"] == 6
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step_0000006")
    weights, seen = (run / "best" / "model.safetensors").read_bytes(), []
    evaluate = train.evaluate

    def look_and_evaluate(*arguments):
        seen.append((run / "best" / "model.safetensors").read_bytes())
        evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", look_and_evaluate)
    run_training(shards, tmp_path, **settings, max_steps=6)
    assert seen == [weights]  # of step 6, repeated from step 4
    assert json.loads((run / "best" / "metrics.json").read_text()) == best


def test_if_all_checkpoints_are_damaged_nothing_is_replaced(shards, tmp_path, whole_run, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    for checkpoint in (run / "checkpoints").iterdir():
        damage("flipped bit", checkpoint)
    assert train.main(flags(shards, tmp_path, save_every=3)) == 2
    assert "every checkpoint in" in capsys.readouterr().err
    assert len(list((run / "checkpoints").iterdir())) == 4


def test_a_run_resumes_on_another_number_of_processes(shards, tmp_path, forks):
    settings = {"save_every": 3, "learning_rate": 1e-3}
    whole = run_training(shards, tmp_path, "whole", **settings)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "step_0000006", run / "checkpoints" / "step_0000006")
    result = forks.launch(2, "train", flags(shards, tmp_path, **settings, micro_batch_size=4), tmp_path)
    assert result.code == 0, result.err
    assert "2 process(es)" in result.out
    ours, expected = read_losses(run), read_losses(whole)
    assert list(ours) == list(range(7, N_STEPS + 1))
    assert np.allclose(list(ours.values()), list(expected.values())[6:], atol=1e-4)


def test_the_newest_checkpoints_and_some_models_are_kept(shards, tmp_path):
    run = run_training(shards, tmp_path, **BARE, save_every=2, keep_checkpoints=2, keep_weights_every=4)
    kept = {path.name: (path / "training_state").is_dir() for path in (run / "checkpoints").iterdir()}
    # The newest two checkpoints, and the model of every fourth step.
    assert kept == {"step_0000004": False, "step_0000008": False, "step_0000010": True, "step_0000012": True}
    assert (run / "checkpoints" / "step_0000004" / "model.safetensors").exists()
    # Going back also deletes later models.
    run_training(
        shards,
        tmp_path,
        **BARE,
        save_every=0,
        max_steps=N_STEPS,
        resume_from_checkpoint=run / "checkpoints" / "step_0000010",
    )
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step_0000004",
        "step_0000008",
        "step_0000010",
    ]


def test_the_best_model_is_kept_beside_the_last(shards, tmp_path):
    # The loss falls at first, and rises again when the learning rate becomes too large.
    settings = {"eval_every": 2, "hellaswag_every": 0, "sample_every": 0, "save_every": 4}
    run = run_training(
        shards, tmp_path, **settings, warmup_tokens=256 * 12, learning_rate=0.5, save_best=True, keep_checkpoints=0
    )
    losses = read_series(run, "val/loss")
    best = min(losses, key=losses.get)
    assert 0 < best < N_STEPS
    kept = json.loads((run / "best" / "metrics.json").read_text())
    assert (kept["step"], kept["val/loss"]) == (best, losses[best])
    weights = load_file(run / "best" / "model.safetensors")
    final = load_file(run / "final" / "model.safetensors")
    assert any(not torch.equal(weights[name], final[name]) for name in final)
    # A resumed run knows the best loss so far.
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / f"step_{N_STEPS:07d}")
    before = (run / "best" / "model.safetensors").stat().st_mtime_ns if best <= 8 else None
    run_training(
        shards, tmp_path, **settings, warmup_tokens=256 * 12, learning_rate=0.5, save_best=True, keep_checkpoints=0
    )
    kept_again = json.loads((run / "best" / "metrics.json").read_text())
    assert kept_again == kept
    assert before in (None, (run / "best" / "model.safetensors").stat().st_mtime_ns)


def test_a_best_model_that_may_not_be_durable_is_not_replaced_by_a_worse_one(shards, tmp_path, monkeypatch, capfd):
    """As in the previous test, but with one I/O error after the best model has been renamed into place."""
    sync_folder, refused = files.sync_folder, []

    def refuse_once(folder):
        best = tmp_path / "run" / "best" / "metrics.json"
        if best.exists() and not refused and json.loads(best.read_text())["step"] == 4:
            refused.append(folder)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync_folder(folder)

    monkeypatch.setattr(files, "sync_folder", refuse_once)
    settings = {**BARE, "eval_every": 2, "warmup_tokens": 256 * 12, "learning_rate": 0.5, "save_best": True}
    run = run_training(shards, tmp_path, **settings, save_every=0)
    assert refused == [run] and "the best model was not written" in capfd.readouterr().out
    losses = read_series(run, "val/loss")
    assert losses[4] == min(losses.values()) and any(losses[4] < losses[step] < losses[2] for step in losses)
    assert json.loads((run / "best" / "metrics.json").read_text())["step"] == 4


@pytest.mark.parametrize("limit", [20_000, 60_000, 90_000])  # the model has 95,000 bytes, its tokenizer 53,000
def test_a_full_disk_costs_a_checkpoint_but_not_the_run(shards, tmp_path, whole_run, capsys, limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # no file can grow larger
        code = train.main(flags(shards, tmp_path, save_every=3, eval_every=0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out, err = capsys.readouterr()
    assert code == 2
    assert [out.count(f"checkpoint of step {step} was not written, training continues") for step in (3, 6, 9, 12)] == [
        1
    ] * 4
    assert "there is no checkpoint yet" in err
    assert err.count("\n") == 1
    run = tmp_path / "run"
    assert list(read_losses(run)) == list(range(1, N_STEPS + 1))
    assert list((run / "checkpoints").iterdir()) == []
    assert read_status(run)["status"] == "failed"


def test_a_tracker_that_fails_does_not_change_the_run(shards, tmp_path, whole_run, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    (run / "tensorboard").touch()  # in place of its folder
    run_training(shards, tmp_path, save_every=3, report_to="tensorboard")
    out = capsys.readouterr().out
    assert out.count("the tracker tensorboard failed, training continues without it: FileExistsError") == 1
    assert out.count("the tracker tensorboard failed again and is incomplete") == 1
    assert_same_end(run, whole_run)


def test_a_changed_experiment_is_reported(shards, tmp_path, whole_run, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    other = tmp_path / "other_shards"
    shutil.copytree(shards, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["shards"][-1]["checksum"] = "sha256:0"
    (other / "manifest.json").write_text(json.dumps(manifest))

    def complain(data_dir: Path = shards, **changes) -> str:
        assert train.main(flags(data_dir, tmp_path, save_every=3, **changes)) == 2
        return capsys.readouterr().err

    assert "the training data changed" in complain(other)
    assert "tokens_per_step was 256 and is now 128" in complain(tokens_per_step=128)
    assert "n_layer was 2 and is now 3" in complain(n_layer=3)
    # Otherwise config.yaml and the model card would name weights that this run never had.
    assert f"init_from was scratch and is now {run / 'final'}" in complain(init_from=run / "final")
    longer = complain(max_steps=24)
    assert "max_steps was 12 and is now 24" in longer and "--lr_schedule constant" in longer
    assert "--init_from" in longer
    assert_same_end(run, whole_run)


def rewrite_experiment(checkpoint: Path, change: Callable[[dict], object]) -> None:
    """Change the experiment recorded in a checkpoint, as if another version had written it."""
    state, checksums = (checkpoint / "training_state" / name for name in ("state.json", "checksums.json"))
    content = json.loads(state.read_text())
    change(content["experiment"])
    state.write_text(json.dumps(content))
    known = json.loads(checksums.read_text()) | {"training_state/state.json": compute_checksum(state)}
    checksums.write_text(json.dumps(known))


def test_a_model_size_and_its_shape_are_the_same_experiment(shards, tmp_path, whole_run, monkeypatch, capsys):
    shutil.copytree(whole_run, tmp_path / "run")
    monkeypatch.setitem(MODEL_SIZES, "tiny", {"n_layer": 2, "n_head": 2, "n_embd": 16})
    argv = [flag for flag in flags(shards, tmp_path, save_every=3) if not flag.startswith("--n_")]
    assert train.main([*argv, "--model_size=tiny"]) == 0
    assert "is finished" in capsys.readouterr().out
    assert train.main(argv) == 2
    assert "n_layer was 2 and is now 12" in capsys.readouterr().err
    newest = tmp_path / "run" / "checkpoints" / "step_0000012"
    rewrite_experiment(newest, lambda experiment: experiment.update(model_size=None, n_layer=2, n_head=2, n_embd=16))
    assert train.main([*argv, "--model_size=tiny"]) == 0


def test_a_finetuned_run_resumes_only_with_its_original_model(shards, tmp_path, whole_run, capsys):
    start = {"init_from": whole_run / "final", **BARE}
    run = run_training(shards, tmp_path, **start)
    shutil.rmtree(run / "final")
    newest = run / "checkpoints" / "step_0000012"
    shutil.rmtree(newest)
    assert train.main(flags(shards, tmp_path, **BARE)) == 2
    assert f"init_from was {start['init_from']} and is now scratch" in capsys.readouterr().err
    run_training(shards, tmp_path, **start)
    assert "from step 6" in capsys.readouterr().out
    # Checkpoints from before init_from was recorded are accepted.
    rewrite_experiment(newest, lambda experiment: experiment.pop("init_from"))
    assert train.main(flags(shards, tmp_path, **start)) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("schedule, step", [pytest.param("constant", 6, marks=pytest.mark.slow), ("wsd", 6)])
def test_a_run_with_a_constant_rate_can_be_prolonged(shards, tmp_path, schedule, step):
    settings = {**BARE, "lr_schedule": schedule, "save_every": 6, "keep_checkpoints": 0}
    run = run_training(shards, tmp_path, **settings)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step_0000012")
    whole = run_training(shards, tmp_path, "whole", **settings, max_steps=24)
    run_training(shards, tmp_path, **settings, max_steps=24)
    assert_same_end(run, whole)


def test_a_wsd_run_in_its_decay_cannot_be_prolonged(shards, tmp_path, capsys):
    settings = {**BARE, "lr_schedule": "wsd", "save_every": 12}
    run_training(shards, tmp_path, **settings)
    assert train.main(flags(shards, tmp_path, **settings, max_steps=24)) == 2
    assert "max_steps was 12 and is now 24" in capsys.readouterr().err
