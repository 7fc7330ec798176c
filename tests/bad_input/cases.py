"""Shared parts of the bad-input tests: an example of every input of the scripts, and a watch over a script's call.

The contract: for any input, a script succeeds, or exits with code 2 and a one-line error. It never shows a traceback,
never hangs, and changes no files but its own output.
"""

import atexit
import contextlib
import faulthandler
import functools
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet
import torch
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, settings
from tokenizers import pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

import eval_hellaswag
import prepare_data
import train
from modeling_gpt2_repro.core.errors import reports_user_errors
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE
from modeling_gpt2_repro.plots.run_figure import draw_curves
from modeling_gpt2_repro.training.run_folder import RunFolder
from modeling_gpt2_repro.training.throughput import Peak

# A case takes a tenth of a second; one that takes this long hangs.
CASE_SECONDS = 60
EOT = 256
# The scripts may write these beside a folder's shards.
FOLDER_OUTPUTS = ("given/data/baselines.json", "given/data/inspection.png")

TINY = {
    **{"n_layer": 1, "n_head": 1, "n_embd": 8, "sequence_length": 8, "tokens_per_step": 16, "max_steps": 2},
    **{"micro_batch_size": 2, "warmup_tokens": 16, "mixed_precision": "no", "compile": "off", "report_to": "none"},
    **{"eval_every": 1, "eval_tokens": 16, "hellaswag_every": 0, "sample_every": 1, "sample_prompt": "a"},
    **{"sample_tokens": 4, "save_every": 1, "data_dir": "../given/data", "output_dir": "runs", "run_name": "run"},
}

# Set by `make fuzz`, which runs more cases, different ones each time; `make test` always runs the same.
FUZZ_FACTOR = int(os.environ.get("FUZZ_FACTOR", "0"))


def cases(count: int) -> Callable:
    """Decorate a property test to run `count` fixed cases, or many times as many random ones under `make fuzz`."""
    return settings(
        max_examples=count * max(1, FUZZ_FACTOR),
        derandomize=not FUZZ_FACTOR,
        print_blob=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        **({} if FUZZ_FACTOR else {"database": None}),
    )


@reports_user_errors
def draw(argv: Sequence[str] | None = None) -> int:
    """Draw a run's curves as a script would."""
    draw_curves(RunFolder(argv[0]))
    return 0


@functools.cache
def build_originals() -> Path:
    """Build an example of every input of the scripts, in a folder that is removed at the end of the process."""
    folder = Path(tempfile.mkdtemp(prefix="originals-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        write_originals(folder)
    except BaseException:
        shutil.rmtree(folder)  # each test that needs it tries again, and fuzzing is often interrupted
        raise
    return folder


def write_originals(folder: Path) -> None:
    """Write the files of `build_originals`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)} | {"<|endoftext|>": EOT}
    GPT2TokenizerFast(vocab=vocabulary, merges=[]).save_pretrained(folder / "tokenizer")

    texts = [f"{i} the keeper counted {'ships ' * (i % 7)}" for i in range(60)]
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.jsonl").write_text(lines)
    (folder / "corpus" / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (folder / "corpus" / "c.txt").write_text("\n\n".join(texts))
    (folder / "corpus" / "d.txt.gz").write_bytes(gzip.compress("\n\n".join(texts).encode(), mtime=0))
    pa.parquet.write_table(pa.table({"text": texts}), folder / "corpus" / "e.parquet", row_group_size=20)
    with (
        pa.OSFile(str(folder / "corpus" / "f.jsonl.zst"), "wb") as file,
        pa.CompressedOutputStream(file, "zstd") as stream,
    ):
        stream.write(lines.encode())

    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 64, "vocab_size": EOT + 1}
    no_special_tokens = {"bos_token_id": EOT, "eos_token_id": EOT}
    GPT2LMHeadModel(GPT2Config(**shape, **no_special_tokens)).save_pretrained(folder / "model")
    shutil.copytree(folder / "tokenizer", folder / "model", dirs_exist_ok=True)
    items = SAMPLE_FILE.read_text().splitlines()[:3]
    rows = [json.loads(line) for line in items]
    for row in rows:  # short enough for the model
        row |= {"ctx": row["ctx"][:20], "ctx_a": row["ctx_a"][:20], "ctx_b": row["ctx_b"][:20]}
        row["endings"] = [ending[:12] for ending in row["endings"]]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    with contextlib.redirect_stdout(io.StringIO()), quick_machine(), contextlib.chdir(folder):
        source = ["--files=corpus/a.jsonl", f"--tokenizer={folder}/tokenizer", "--num_workers=1"]
        assert prepare_data.main([*source, "--output_dir=data", "--val_tokens=200", "--shard_size=900"]) == 0
        changes = {"data_dir": "data", "output_dir": ".", "hellaswag_every": 1, "hellaswag_file": "items.jsonl"}
        changes |= {"sequence_length": 64, "tokens_per_step": 128, "eval_tokens": 64, "warmup_tokens": 128}
        assert train.main(to_flags(TINY | changes)) == 0
        draw_curves(RunFolder("run"))
        assert eval_hellaswag.main(to_flags({"model": "run/final", "data_file": "items.jsonl"})) == 0
    AcceleratorState._reset_state(reset_partial_state=True)


def to_flags(values: dict) -> list[str]:
    """Format settings as flags."""
    return [f"--{name}={value}" for name, value in values.items()]


@dataclass(frozen=True)
class Case:
    """A folder with `given/`, copies of originals to damage; `outside/`, named by no input; and `cwd/`, to work in."""

    folder: Path

    @property
    def given(self) -> Path:
        return self.folder / "given"

    @property
    def outside(self) -> Path:
        return self.folder / "outside"


@dataclass(frozen=True)
class Answer:
    """The result of a call: exit code and output."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def open_case(*names: str) -> Iterator[Case]:
    """Open a temporary folder for a case, with copies of the originals in `names`."""
    originals = build_originals()
    with tempfile.TemporaryDirectory(prefix="case-") as name:
        case = Case(Path(name).resolve())
        for subfolder in (case.given, case.outside, case.folder / "cwd"):
            subfolder.mkdir()
        for name in names:
            source = originals / name
            if source.is_dir():
                shutil.copytree(source, case.given / name)
            else:
                shutil.copy(source, case.given / name)
        (case.given / "loop").symlink_to("loop")
        shutil.copy(next((originals / "data").glob("*.npy")), case.outside / "secret_val_000000.npy")
        yield case


def answer(main: Callable, argv: Sequence[str], case: Case, outputs: Sequence[str] = FOLDER_OUTPUTS) -> Answer:
    """Call a script in a case's `cwd`, and check the contract.

    Args:
        outputs: files outside `cwd` that the call may write, relative to the case's folder.
    """
    before = hash_tree(case.folder)
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    with (
        contextlib.chdir(case.folder / "cwd"),
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
        mock.patch.object(sys, "argv", ["script.py"]),
        quick_machine(),
        time_limit(CASE_SECONDS),
        watched_actions(case.folder) as actions,
    ):
        try:
            code = main(list(argv))
        except SystemExit as exit_:
            code = exit_.code or 0
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
    out, err = (stream.buffer.getvalue().decode() for stream in streams)
    check_answer(Answer(code, out, err), before, case, outputs)
    assert not actions, "\n".join(actions)
    return Answer(code, out, err)


def check_answer(given: Answer, before: dict[str, str], case: Case, outputs: Sequence[str]) -> None:
    """Check the exit code, the error line, and that only allowed outputs changed."""
    assert given.code in (0, 2), given
    assert "Traceback" not in given.err
    errors = [line for line in given.err.splitlines() if ".py: error: " in line]
    assert len(errors) == (given.code == 2), given.err
    assert given.code == 0 or given.err.splitlines()[-1:] == errors, given.err
    after = hash_tree(case.folder)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert {name for name in changed if not name.startswith("cwd/")} <= set(outputs)
    assert not [name for name in after if name.endswith(".partial")]


def hash_tree(folder: Path) -> dict[str, str]:
    """Return a fingerprint of each file in a folder by its relative path; a link's is its target."""
    entries = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink():
                content = f"link to {os.readlink(path)}"
            elif path.is_file():
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            elif name in files:
                content = "neither file nor folder"
            else:
                continue
            entries[str(path.relative_to(folder))] = content
    return entries


@contextlib.contextmanager
def quick_machine() -> Iterator[None]:
    """Skip slow steps that do not depend on the input: timing the machine, and drawing during a run."""
    with (
        mock.patch("modeling_gpt2_repro.training.run.choose_peak", lambda *_: Peak(1e9, "a test")),
        mock.patch("train.CurveDrawer", mock.MagicMock()),
    ):
        yield


class TookTooLong(BaseException):
    """Not an `Exception`, so no handler mistakes it for an error in the input."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TookTooLong` after `seconds`; end the process if that is not enough."""

    def interrupt(*_):
        raise TookTooLong(f"more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(4 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# Audit events of the interpreter (PEP 578).
PROGRAM_EVENTS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect"}
FILE_EVENTS = {"os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.symlink", "os.link", "os.truncate"}
FILE_EVENTS |= {"shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Watch:
    """The actions outside of `folder` of all threads that are not `foreign`."""

    folder: str
    foreign: set[int]
    actions: list[str]

    def note(self, action: str) -> None:
        callers = traceback.format_list(traceback.extract_stack(limit=12)[:-2])
        self.actions.append(f"{action}, called by\n{''.join(callers)}")


_watch: Watch | None = None


@contextlib.contextmanager
def watched_actions(folder: Path) -> Iterator[list[str]]:
    """Collect writes outside of `folder`, and programs and connections that are started, with their callers.

    Threads that existed before are ignored: one of wandb's, left by other tests, connects to its server once a minute.
    """
    global _watch
    _install_audit_hook()
    foreign = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
    _watch = Watch(str(folder), foreign, [])
    try:
        yield _watch.actions
    finally:
        _watch = None


@functools.cache
def _install_audit_hook() -> None:
    sys.addaudithook(_note_action)  # stays until the process ends


def _note_action(event: str, arguments: tuple) -> None:
    if (watch := _watch) is None or threading.get_ident() in watch.foreign:
        return
    if event in PROGRAM_EVENTS:
        watch.note(f"{event} {arguments}")
    elif (event == "open" and arguments[2] & WRITING) or event in FILE_EVENTS:
        names = arguments[:2] if event in ("os.rename", "os.symlink", "os.link") else arguments[:1]
        # A name relative to an open folder belongs to a removal that is already recorded.
        if event != "open" and any(type(argument) is int and argument >= 0 for argument in arguments[1:]):
            return
        for name in names:
            if not isinstance(name, str | bytes | os.PathLike):
                continue
            path = os.path.abspath(os.fsdecode(name))
            if not path.startswith((watch.folder + os.sep, "/dev/")) and "__pycache__" not in path:
                watch.note(f"{event} {path}")
