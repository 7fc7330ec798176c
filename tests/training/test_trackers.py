"""What trackers receive from a run, read from their own files."""

import json
import os
import shutil
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import wandb
from accelerate import Accelerator
from small_runs import flags, read_series
from tracker_files import PATIENCE_SECONDS, read_tensorboard, read_wandb_run

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.training import wandb_settings
from modeling_gpt2_repro.training.checkpoint import load_state
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.metrics import read_json_lines
from modeling_gpt2_repro.training.record import RunRecord
from modeling_gpt2_repro.training.run_folder import RunFolder
from modeling_gpt2_repro.training.trackers import choose_trackers
from modeling_gpt2_repro.training.wandb_settings import has_key

pytestmark = pytest.mark.heavy


@pytest.fixture(autouse=True)
def _nobodys_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for name in ("NETRC", *(name for name in os.environ if name.startswith("WANDB_"))):
        monkeypatch.delenv(name, raising=False)


def train_in_a_terminal(forks, argv: list[str], folder: Path) -> str:
    """Run train.py with a terminal as its input and output."""
    script = f"from standard_streams import *\nos.chdir({str(folder)!r})\n"
    script += (
        "for name in [name for name in os.environ if name.startswith(('WANDB_', 'NETRC'))]: del os.environ[name]\n"
    )
    script += f"end(show_terminal({argv!r}, {PATIENCE_SECONDS}))"
    result = forks.run("standard_streams", [], folder, {"HOME": os.environ["HOME"]}, script)
    assert result.code == 0, result.out + result.err
    return result.out


def read_wandb_runs(run: Path) -> list[dict]:
    return [read_wandb_run(path) for path in sorted(run.rglob("*.wandb"), key=lambda path: path.stat().st_mtime)]


def read_table(run: Path) -> list:
    """Return the last table of samples that wandb received."""
    tables = [json.loads(path.read_text()) for path in run.rglob("samples_*.table.json")]
    return max((table["data"] for table in tables), key=len)


def test_trackers_show_the_same_as_the_files_even_after_a_resume(shards, tmp_path, forks):
    argv = flags(shards, tmp_path, report_to="wandb,tensorboard")
    printed = train_in_a_terminal(forks, argv, tmp_path)
    assert "trackers: wandb and tensorboard" in printed
    run = tmp_path / "run"
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step_0000012")
    train_in_a_terminal(forks, argv, tmp_path)

    first, second = read_wandb_runs(run)
    state = load_state(run / "checkpoints" / "step_0000012")
    assert first["id"] == second["id"] == state.tracker_run_id
    assert first["name"] == second["name"] == "run"
    assert first["config"]["learning_rate"] == 2e-2
    assert second["summary"]["hellaswag/protocol"] == "original"
    scalars, texts = read_tensorboard(run / "tensorboard")
    for name in ("train/loss", "train/lr", "train/grad_norm", "val/loss", "val/bpb", "hellaswag/acc_norm"):
        series = read_series(run, name)
        history = {step: items[name] for step, items in first["history"].items() if name in items and step <= 6}
        history |= {step: items[name] for step, items in second["history"].items() if name in items}
        assert history == pytest.approx(series), name
        assert scalars[name] == pytest.approx(series), name
        assert second["summary"][name] == pytest.approx(series[12])
    samples = [[line["step"], line["text"]] for line in read_json_lines(run / "samples.jsonl")]
    assert {step for step, _ in samples} == {0, 6, 12}
    assert read_table(run) == samples
    assert list(texts["samples"]) == [0, 6, 12]
    for step, shown in texts["samples"].items():
        written = [text for at, text in samples if at == step]
        assert [text.split() for text in shown.split("\n\n---\n\n")] == [text.split() for text in written]
    assert "learning_rate: 0.02" in texts["config"][6]


class Warnings(list):
    def __call__(self, text: str) -> None:
        self.append(text)


def start_record(folder: Path, report_to: str, first_step: int | None = None) -> RunRecord:
    record = RunRecord(RunFolder(folder), Accelerator(), Warnings(), choose_trackers(report_to))
    record.start(TrainingConfig(run_name="run", report_to=report_to), first_step)
    return record


def log_steps(record: RunRecord, steps: range) -> None:
    for step in steps:
        record.log(step, {"train/loss": 5.0 - step})
        record.log_samples(step, [f"text {step}", f"other {step}"])


def test_a_tracker_that_does_not_start_receives_everything_at_the_end(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").touch()
    record = start_record(tmp_path / "run", "wandb,tensorboard")
    log_steps(record, range(1, 4))
    (warning,) = record.warn
    assert warning.startswith("the tracker tensorboard failed, training continues without it: FileExistsError")
    (record.folder.path / "tensorboard").unlink()
    record.close()
    assert record.warn[1:] == ["the tracker tensorboard has received at the end what it missed"]
    scalars, texts = read_tensorboard(record.folder.path / "tensorboard")
    assert scalars["train/loss"] == {1: 4.0, 2: 3.0, 3: 2.0}
    assert list(texts["samples"]) == [1, 2, 3]
    (run,) = read_wandb_runs(record.folder.path)
    assert {step: items["train/loss"] for step, items in run["history"].items()} == {1: 4.0, 2: 3.0, 3: 2.0}


def test_wandb_receives_at_the_end_what_its_dead_service_missed(tmp_path):
    record = start_record(tmp_path / "run", "wandb")
    log_steps(record, range(1, 4))
    (service,) = (child for child in psutil.Process().children(recursive=True) if child.name() == "wandb-core")
    service.kill()
    service.wait()
    log_steps(record, range(4, 8))
    record.close()
    first, last = record.warn
    assert first.startswith("the tracker wandb failed, training continues without it")
    assert last == "the tracker wandb has received at the end what it missed"
    told = read_wandb_run(max(record.folder.path.rglob("*.wandb"), key=lambda path: path.stat().st_mtime))
    losses = {step: items["train/loss"] for step, items in told["history"].items()}
    # A message in the dead service's socket can be lost.
    assert losses == {step: 5.0 - step for step in range(min(losses), 8)} and min(losses) <= 5
    assert told["id"] == record.tracker_run_id
    assert read_table(record.folder.path)[-2:] == [[7, "text 7"], [7, "other 7"]]
    assert len(read_table(record.folder.path)) == 14


def test_a_resumed_run_shows_repeated_steps_once(tmp_path):
    record = start_record(tmp_path / "run", "tensorboard")
    log_steps(record, range(1, 6))
    record.close()
    record = start_record(tmp_path / "run", "tensorboard", first_step=3)
    record.log(4, {"train/loss": 0.5})
    record.close()
    scalars, texts = read_tensorboard(tmp_path / "run" / "tensorboard")
    assert scalars["train/loss"] == {1: 4.0, 2: 3.0, 3: 2.0, 4: 0.5}
    assert list(texts["samples"]) == [1, 2, 3]


def test_a_run_that_starts_over_has_a_new_tracker_id(tmp_path):
    record = start_record(tmp_path / "run", "tensorboard")
    record.log(0, {"val/loss": 9.0})
    log_steps(record, range(1, 6))
    record.close()
    again = start_record(tmp_path / "run", "tensorboard")
    again.log(1, {"train/loss": 0.5})
    again.close()
    assert read_tensorboard(tmp_path / "run" / "tensorboard")[0] == {"train/loss": {1: 0.5}}
    assert again.tracker_run_id != record.tracker_run_id


def test_wandb_is_chosen_only_with_a_key_or_on_request(monkeypatch, tmp_path):
    assert choose_trackers("auto") == choose_trackers("none") == []
    assert choose_trackers("wandb") == ["wandb"]
    assert choose_trackers("tensorboard,wandb") == ["wandb", "tensorboard"]
    netrc = tmp_path / "home" / ".netrc"
    netrc.parent.mkdir()
    netrc.write_text("machine api.wandb.ai\n  login user\n  password key\n")
    netrc.chmod(0o600)
    assert choose_trackers("auto") == ["wandb"]
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert choose_trackers("auto") == []
    monkeypatch.setenv("WANDB_API_KEY", "not-a-key")
    assert choose_trackers("auto") == ["wandb"]
    assert choose_trackers("none") == []


@pytest.mark.parametrize("requested", ["tensorbord", "wandb,", "all", "wandb, tensorboard", "none,wandb", ""])
def test_unknown_trackers_are_rejected(requested):
    with pytest.raises(UserError, match="must be auto, none, or one or more of wandb, tensorboard"):
        TrainingConfig(report_to=requested)


def test_a_tracker_that_is_not_installed_is_reported_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    with pytest.raises(UserError, match="pip install tensorboard"):
        choose_trackers("tensorboard")


def test_a_user_without_a_home_folder_can_train(monkeypatch, tmp_path):
    """As in a container whose user id has neither a name nor a home folder."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not has_key()
    (tmp_path / "keys").write_text("machine api.wandb.ai login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
    assert has_key()


KEY = "0123456789abcdef0123456789abcdef01234567"


class _Answer(BaseHTTPRequestHandler):
    """Answers every request with the server's `status`, or never."""

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.status is None:
            self.server.is_over.wait(PATIENCE_SECONDS)
            return
        self.send_response(self.server.status)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """Return a function that starts a server with one status for all requests (`None`: silent) and returns its URL."""
    servers = []

    def serve(status):
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Answer)
        server.status, server.is_over, server.daemon_threads = status, threading.Event(), True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.is_over.set()
        server.shutdown()
        server.server_close()


def record_run(tmp_path) -> tuple[Warnings, list[dict], float]:
    """Record a run of three steps with wandb; return the warnings, the offline runs, and the seconds of its start."""
    wandb.teardown()  # forget the environment that it has read
    started = time.monotonic()
    record = start_record(tmp_path / "run", "wandb")
    seconds = time.monotonic() - started
    log_steps(record, range(1, 4))
    record.close()
    runs = sorted(path for path in tmp_path.rglob("offline-run-*/*.wandb") if "latest-run" not in path.parts)
    return record.warn, [{"path": path, **read_wandb_run(path)} for path in runs], seconds


@pytest.mark.parametrize(
    "trouble", ["refused", "500", "401", "silent", "bad key", "bad mode", "bad address", "bad id", "bad resume"]
)
def test_trouble_with_wandb_leads_to_a_complete_offline_run(trouble, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_settings, "ANSWER_SECONDS", 1)
    environment = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"} | {
        "refused": {},
        "500": {"WANDB_BASE_URL": serve(500) + "/"},
        "401": {"WANDB_BASE_URL": serve(401)},
        "silent": {"WANDB_BASE_URL": serve(None)},
        "bad key": {"WANDB_API_KEY": "short", "WANDB_BASE_URL": serve(200)},
        "bad mode": {"WANDB_MODE": "nonsense"},
        "bad address": {"WANDB_BASE_URL": "nonsense"},
        "bad id": {"WANDB_RUN_ID": "a/b", "WANDB_MODE": "offline"},
        "bad resume": {"WANDB_RESUME": "nonsense", "WANDB_MODE": "offline"},
    }[trouble]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (warning,), (run,), seconds = record_run(tmp_path)
    assert seconds < 30  # even on a busy machine; wandb alone takes minutes
    assert warning.startswith("wandb is offline") and warning.endswith(f"wandb sync {run['path'].parent}")
    assert {step: items["train/loss"] for step, items in run["history"].items()} == {1: 4.0, 2: 3.0, 3: 2.0}
    assert {name: os.environ[name] for name in environment} == environment


@pytest.mark.parametrize(
    "environment", [{"WANDB_MODE": "OFFLINE"}, {"WANDB_MODE": "dryrun"}, {"WANDB_MODE": ""}, {"WANDB_MODE": "online"}]
)
def test_wandb_goes_offline_silently_when_told_to_or_without_a_key(environment, tmp_path, monkeypatch):
    if environment["WANDB_MODE"] not in ("", "online"):
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    warnings, runs, _ = record_run(tmp_path)
    assert warnings == [] and len(runs) == 1 and len(runs[0]["history"]) == 3


def test_wandbs_own_variables_take_precedence(tmp_path, monkeypatch):
    theirs = {
        "WANDB_RUN_ID": "mine",
        "WANDB_NAME": "a name",
        "WANDB_DIR": str(tmp_path / "elsewhere"),
        "WANDB_PROJECT": "project",
    }
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    warnings, (run,), _ = record_run(tmp_path)
    assert warnings == [] and run["id"] == "mine" and run["name"] == "a name"
    assert run["path"].is_relative_to(tmp_path / "elsewhere")
    assert b"project" in run["path"].read_bytes()


def test_wandb_writes_to_the_run_folder_if_it_cannot_write_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "file" / "nowhere"))
    warnings, (run,), _ = record_run(tmp_path)
    assert warnings == [] and run["path"].is_relative_to(tmp_path / "run")
    assert read_table(tmp_path / "run")[-1] == [3, "other 3"]


@pytest.mark.parametrize("file", [None, "wandb/settings", "home/.config/wandb/settings"])
def test_wandbs_own_switches_turn_it_off(file, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert choose_trackers("auto") == ["wandb"]
    if file is None:
        for name, value in (("WANDB_MODE", "Disabled"), ("WANDB_DISABLED", "true")):
            with monkeypatch.context() as patch:
                patch.setenv(name, value)
                assert choose_trackers("auto") == choose_trackers("wandb") == []
    else:
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("[default]\nmode = disabled\n")  # as `wandb disabled` does
        assert choose_trackers("auto") == [] and choose_trackers("wandb,tensorboard") == ["tensorboard"]
        monkeypatch.setenv("WANDB_MODE", "offline")
        assert choose_trackers("wandb") == ["wandb"]


@pytest.mark.parametrize(
    ("lines", "base_url", "expected"),
    [
        ("machine api.wandb.ai\n  login user\n  password key\n", None, True),
        ("machine api.wandb.ai login user password key", "https://api.wandb.ai/", True),
        ("machine wandb.example.org:8080 login user password key", "http://wandb.example.org:8080/", True),
        ("machine wandb.example.org login user password key", None, False),
        ("machine api.wandb.ai login user password key", "https://wandb.example.org", False),
        ("default login user password key", None, True),
        ("machine", None, False),
        ("", None, False),
    ],
)
@pytest.mark.parametrize("place", [".netrc", "_netrc", "NETRC"])
def test_keys_stored_by_wandb_login_are_found(lines, base_url, expected, place, tmp_path, monkeypatch):
    path = tmp_path / "home" / place
    path.parent.mkdir()
    path.write_text(lines)
    if place == "NETRC":
        monkeypatch.setenv("NETRC", str(path))
    if base_url is not None:  # as `wandb login --host` writes it
        (tmp_path / "home" / ".config" / "wandb").mkdir(parents=True)
        (tmp_path / "home" / ".config" / "wandb" / "settings").write_text(f"[default]\nbase_url = {base_url}\n")
    assert has_key() is expected


def test_a_silent_name_service_does_not_delay_the_run(monkeypatch):
    monkeypatch.setattr(wandb_settings, "ANSWER_SECONDS", 0.2)
    over = threading.Event()

    def wait(*_, **__):
        over.wait(PATIENCE_SECONDS)
        raise OSError

    monkeypatch.setattr("urllib.request.urlopen", wait)
    with pytest.raises(TimeoutError, match="does not answer"):
        wandb_settings.ask_server("https://wandb.example.org")
    over.set()
    monkeypatch.undo()
    with pytest.raises(ConnectionError, match="does not answer"):
        wandb_settings.ask_server("nonsense")
