"""Failures of the machine and foreign settings: one accurate error line, or a fallback.

Each failure is a real one, in a fork of a process that has imported the scripts.
"""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from cases import TINY, build_originals, open_case, to_flags
from conftest import REPOSITORY
from test_flags import EVALUATE, PREPARE

from modeling_gpt2_repro import __main__ as commands

PATH = os.pathsep.join([str(REPOSITORY), *(str(REPOSITORY / "tests" / name) for name in ("", "bad_input"))])
COMMANDS = "modeling_gpt2_repro.__main__"
MODULES = ("train", "prepare_data", "eval_hellaswag", COMMANDS)
HELPFUL = {module: (module, []) for module in MODULES} | {name: (COMMANDS, [name]) for name in commands.COMMANDS}
# Without root's first three capabilities (linux/capability.h), root cannot read unreadable files either.
NO_PRIVILEGES = """
import ctypes
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
libc = ctypes.CDLL(None, use_errno=True)
assert libc.capget(header, sets) == 0
sets[0] &= ~0b111
assert libc.capset(header, sets) == 0
"""
RUN = """
import cases, contextlib
try:
    with cases.quick_machine():
        code = module.main(run["argv"])
except SystemExit as end:  # of --help
    code = end.code or 0
sys.stdout.flush()
os._exit(code)
"""


def run(forks, case, program: str, settings: dict, setup: str = NO_PRIVILEGES) -> SimpleNamespace:
    """Run a script or command in a case's `cwd`, and check that it succeeds or prints a one-line error."""
    script = f"os.chdir({str(case.folder / 'cwd')!r})\n{setup}\n{RUN}"
    module, argv = HELPFUL.get(program, (program, []))
    given = forks.run(module, [*argv, *to_flags(settings)], case.folder, script=script)
    assert "Traceback" not in given.err, given.err
    assert given.code in (0, 2), given.err
    if given.code == 2:
        assert given.err.count("error: ") == 1 and given.err.splitlines()[-1].startswith(
            module.removesuffix(".__main__")
        )
        lies = ("damaged", "overwrite", "rebuild", "prepare the", "not a complete")
        assert not any(lie in given.err for lie in lies), given.err
    return given


VERIFY = {"output_dir": "../given/data", "verify": True}
# What is read: by which script, with which settings, from which file.
READ = {
    "a shard": ("train", TINY, "data/a_train_000001.npy"),
    "a manifest": ("train", TINY, "data/manifest.json"),
    "a verified shard": ("prepare_data", VERIFY, "data/a_train_000002.npy"),
    "a model": ("eval_hellaswag", EVALUATE, "model/model.safetensors"),
    "a model's configuration": ("train", TINY | {"init_from": "../given/model"}, "model/config.json"),
    "initial weights": ("train", TINY | {"init_from": "../given/model"}, "model/model.safetensors"),
    "a model's tokenizer": ("eval_hellaswag", EVALUATE, "model/tokenizer.json"),
    "a tokenizer": ("prepare_data", PREPARE, "tokenizer/tokenizer.json"),
    "a corpus": ("prepare_data", PREPARE, "corpus/a.jsonl"),
    "a parquet file": ("prepare_data", PREPARE | {"files": "../given/corpus/e.parquet"}, "corpus/e.parquet"),
    "a compressed file": ("prepare_data", PREPARE | {"files": "../given/corpus/f.jsonl.zst"}, "corpus/f.jsonl.zst"),
    "a nanoGPT checkpoint": (
        "convert",
        {"checkpoint": "../given/corpus/a.jsonl", "output_dir": "out", "tokenizer": "none"},
        "corpus/a.jsonl",
    ),
    "items": ("eval_hellaswag", EVALUATE, "items.jsonl"),
}


@pytest.mark.parametrize("what", READ)
def test_an_unreadable_file_is_not_reported_as_damaged(forks, what):
    module, settings, name = READ[what]
    with open_case("data", "model", "tokenizer", "corpus", "items.jsonl") as case:
        (case.given / name).chmod(0)
        given = run(forks, case, module, settings)
    assert given.code == 2 and "Permission denied" in given.err and name.rpartition("/")[0] in given.err


@pytest.mark.parametrize("name", ["", "step_0000002", "step_0000002/model.safetensors", "step_0000002/training_state"])
def test_an_unreadable_checkpoint_is_not_skipped(forks, name):
    with open_case("data", "items.jsonl") as case:
        assert run(forks, case, "train", TINY | {"keep_checkpoints": 0}, "").code == 0
        folder = case.folder / "cwd" / "runs" / "run"
        shutil.rmtree(folder / "final")
        hidden = folder / "checkpoints" / name
        hidden.chmod(0)
        given = run(forks, case, "train", TINY)
        hidden.chmod(0o755)
        assert given.code == 2 and "skipped a checkpoint" not in given.out and "could not be read" in given.err
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_0000001", "step_0000002"]
        assert run(forks, case, "train", TINY).code == 0


def test_more_shards_than_open_files_are_read(forks):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))"
    with open_case("corpus", "tokenizer") as case:
        assert run(forks, case, "prepare_data", PREPARE | {"output_dir": "data", "shard_size": 3}, limit).code == 0
        assert len(list((case.folder / "cwd" / "data").glob("*_train_*.npy"))) > 90
        given = run(forks, case, "train", TINY | {"data_dir": "data"}, limit)
        assert given.code == 0, given.err


@pytest.mark.parametrize("program", HELPFUL)
def test_help_works_without_docstrings(forks, tmp_path, program):
    """As with `python -OO`, which removes them."""
    script = f"module.__doc__ = module.main.__doc__ = None\n{RUN}"
    module, argv = HELPFUL[program]
    given = forks.run(module, [*argv, "--help"], tmp_path, script=script)
    assert (given.code, given.err) == (0, "") and "usage" in given.out


FAILING = {
    "train.py": {"TQDM_MININTERVAL": "often"},
    "prepare_data.py": {"HF_HUB_DOWNLOAD_TIMEOUT": "long"},
    "eval_hellaswag.py": {"TQDM_NCOLS": "wide"},
    "-mmodeling_gpt2_repro": {"TQDM_MAXINTERVAL": "rarely"},
    "-mmodeling_gpt2_repro.evaluation.sampling": {"TQDM_MINITERS": "few"},
}


@pytest.mark.parametrize("command", FAILING)
def test_environment_variables_that_libraries_reject_are_reported(command):
    environment = os.environ | {"PYTHONPATH": PATH} | FAILING[command]
    process = subprocess.run(
        [sys.executable, command, "--help"], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    ((name, value),) = FAILING[command].items()
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1, process.stderr
    assert "in this environment (ValueError: " in process.stderr
    assert f"unset {name}={value}" in process.stderr


def test_figures_do_not_depend_on_matplotlibs_configuration(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: None Such\naxes.facecolor: black\n")
    command = [
        sys.executable,
        "-m",
        "modeling_gpt2_repro",
        "plots",
        build_originals() / "run",
        "--output=a.png",
    ]
    settings = {"PYTHONPATH": PATH, "MPLBACKEND": "nonsense", "MPLCONFIGDIR": os.devnull}
    process = subprocess.run(command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "a.png").read_bytes() == (build_originals() / "run" / "curves.png").read_bytes()


def test_without_shared_memory_a_single_process_is_used(forks):
    no_shared_memory = "import multiprocessing.heap as heap; heap.Arena._dir_candidates = ['/nonexistent']"
    with open_case("corpus", "tokenizer") as case:
        given = run(forks, case, "prepare_data", PREPARE | {"num_workers": 2}, no_shared_memory)
    assert given.code == 0 and "falling back to a single process" in given.out


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems allow only UTF-8 names")
def test_names_that_are_not_utf8(forks):
    with open_case("data", "corpus", "tokenizer") as case:
        odd = os.fsencode(case.folder) + b"/cwd/\xff.jsonl"
        shutil.copy(case.given / "corpus" / "a.jsonl", odd)
        given = run(forks, case, "prepare_data", PREPARE | {"files": "."})
        assert given.code == 2 and "not UTF-8" in given.err
        os.remove(odd)
        os.mkdir(odd)
        folders = {"data_dir": case.given / "data", "output_dir": "runs"}
        given = run(forks, case, "train", TINY | folders, f"os.chdir({odd!r})")
        assert given.code == 2 and "not UTF-8" in given.err


def test_a_cache_folder_that_cannot_be_created_is_reported(forks):
    with open_case("run", "items.jsonl") as case:
        settings = EVALUATE | {"model": "../given/run/final", "trust_remote_code": True}
        nowhere = "import transformers.dynamic_module_utils as d, modeling_gpt2_repro.model.loading as m\n"
        nowhere += f"d.HF_MODULES_CACHE = m.HF_MODULES_CACHE = {os.devnull + '/cache'!r}"
        given = run(forks, case, "eval_hellaswag", settings, nowhere)
    assert given.code == 2 and "set HF_MODULES_CACHE to" in given.err


@pytest.mark.parametrize("script", ["train.py", "prepare_data.py"])
def test_a_deleted_working_folder_is_reported(tmp_path, script):
    command = f"cd {tmp_path} && rmdir {tmp_path} && exec {sys.executable} {REPOSITORY / script} --help"
    process = subprocess.run(
        ["sh", "-c", command], env=os.environ | {"PYTHONPATH": PATH}, capture_output=True, text=True
    )
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert "working folder no longer exists" in process.stderr
