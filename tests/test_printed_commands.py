"""Every command that the project prints or documents is accepted by its program.

The commands in README.md and docs/ are parsed by a shell and then by their programs, and every input of a command must
be the output of an earlier one. Commands that need the Hub or other programs are listed here with the reason. The
commands of a model card are run.
"""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
from conftest import REPOSITORY
from printed_commands import list_blocks, read_commands
from small_corpora import write_tokenizer
from small_runs import flags

import prepare_data
import train
from eval_hellaswag import HellaSwagConfig
from modeling_gpt2_repro.__main__ import COMMANDS
from modeling_gpt2_repro.core.arguments import parse_arguments
from modeling_gpt2_repro.data.prepare.config import PrepareConfig
from modeling_gpt2_repro.data.shards import open_split
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE
from modeling_gpt2_repro.publishing.uploader import Uploader
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.run_folder import RunFolder
from modeling_gpt2_repro.training.throughput import Peak

DOCUMENTS = [
    str(path.relative_to(REPOSITORY))
    for path in sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
    if list_blocks(path.read_text())
]
SETTINGS = {
    "train.py": TrainingConfig,
    "prepare_data.py": PrepareConfig,
    "eval_hellaswag.py": HellaSwagConfig,
}
for name in COMMANDS:
    module = importlib.import_module(f"modeling_gpt2_repro.commands.{name}")
    SETTINGS[f"modeling_gpt2_repro {name}"] = getattr(module, f"{name.capitalize()}Config")
# Inputs that the reader has, or that exist before the first command.
GIVEN = {
    "runs/a", "runs/b",  # any two runs
    "log/log.txt",  # of the original script
    "openai-community/gpt2",  # on the Hub
    "ckpt.pt",  # of nanoGPT
}  # fmt: skip
# Programs that are not installed here, or that need a login, a batch system or the Hub.
FOREIGN = {
    "source": "the environment that `make install` makes",
    "hf": "a login at the Hub",
    "srun": "a batch system",
    "scontrol": "a batch system",
    "head": "part of a batch script",
    "lm_eval": "its data are on the Hub; tests/ecosystem runs the program",
}
# Flags of other programs in the project's texts: accelerate, pip, pytest, torchrun, Slurm, benchmarks.
FOREIGN_FLAGS = {
    *("config_file", "num_processes", "nodes", "ntasks_per_node", "nnodes", "nproc_per_node", "rdzv_backend"),
    *("rdzv_endpoint", "standalone", "model_args", "tasks", "batch_size", "logdir", "only", "toy", "hypothesis_seed"),
    *(
        "extra_index_url",
        "torch_backend",
        "deadline",
        "name",
        "rounds",
        "check",
        "tokens",
        "texts",
        "items",
        "compile",
    ),
}


def parse(program: str, argv: list[str]) -> object:
    """Parse a program's arguments with its own parser, without running it."""
    return parse_arguments(SETTINGS[program], argv, description="")


def find_targets() -> set[str]:
    """Return the targets of the Makefile."""
    return set(re.search(r"^\.PHONY: (.*)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)[1].split())


def follow(command: list[str], made: set[str]) -> None:
    """Check a command against the outputs of the earlier ones, and add its own outputs to `made`."""
    program, *argv = [each for each in command if each != "..."]
    if program in FOREIGN:
        return
    if program == "make":
        targets = [each for each in argv if "=" not in each]
        assert set(targets) <= find_targets()
        made |= {"data/demo", "runs/demo"} if "demo" in targets else set()
        return
    if program in ("accelerate", "torchrun"):
        script = next(each for each in argv if each.endswith(".py"))
        launcher, argv = argv[: argv.index(script)], argv[argv.index(script) :]
        for flag, value in itertools.pairwise(launcher):
            assert flag != "--config_file" or (REPOSITORY / value).is_file()
    else:
        assert program == "python"
    if argv[0] == "-m":
        assert argv[1] == "modeling_gpt2_repro" and argv[2] in COMMANDS
        name, argv = f"{argv[1]} {argv[2]}", argv[3:]
    else:
        name, argv = argv[0], argv[1:]
        assert (REPOSITORY / name).is_file()
    read_files(name, argv, made)


def read_files(name: str, argv: list[str], made: set[str]) -> None:
    """Parse a program's arguments, check that its inputs were made, and add its outputs to `made`."""
    read: list[str] = []
    if name == "benchmarks/gpu.py":
        parts = importlib.import_module("benchmarks.gpu").PARTS
        assert argv[0] in parts
        read = argv[argv.index("--data_dir") + 1 :] if "--data_dir" in argv else []
    elif name.startswith("benchmarks/"):
        assert not argv
    else:
        settings = parse(name, argv)
        if name == "train.py":
            is_plan = settings.plan and settings.max_steps is not None  # needs no data and writes nothing
            read = [] if is_plan else [settings.data_dir]
            made |= set() if is_plan else {f"{settings.output_dir}/{settings.run_name}"}
        elif name == "prepare_data.py":
            made.add(settings.output_dir)
        elif name.endswith(" plots"):
            read = settings.runs
        elif name.endswith((" summary", " publish")):
            read = [settings.folder]
        elif name.endswith(" convert"):
            read = [settings.checkpoint]
        else:
            read = [settings.model]
    for path in read:
        assert path.removesuffix("/final") in made | GIVEN, f"no earlier command makes {path}, which {name} reads"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of_a_document_fit_each_other(document):
    made: set[str] = set()
    # A page of docs/ may use outputs of the README's commands.
    for text in (Path(name).read_text() for name in dict.fromkeys(["README.md", document])):
        for block in list_blocks(text):
            commands = read_commands(block)
            assert commands
            for command in commands:
                follow(command, made)


def test_wrong_commands_are_detected():
    for script in (
        "python train.py --dat_dir x",
        "python train.py --data_dir nobody/made/it",
        "python trains.py",
        "make demos",
        "python -m modeling_gpt2_repro none x",
        "python -m modeling_gpt2_repro plots runs/a --hour",
        "accelerate launch --config_file none.yaml prepare_data.py",
    ):
        with pytest.raises((ValueError, AssertionError, ImportError)):
            for command in read_commands(script):
                follow(command, set())
    made = {"a b"}
    for command in read_commands("python prepare_data.py --output_dir 'c d'; python train.py --data_dir='c d'"):
        follow(command, made)
    assert made == {"a b", "c d", "runs/gpt2_124M"}


@functools.cache
def list_texts() -> dict[str, str]:
    """Return all texts of the project: documents, configurations, strings and comments in its code."""
    names = [*DOCUMENTS, "Makefile", "accelerate_config.yaml", "examples/results.ipynb"]
    paths = [*(REPOSITORY / name for name in names), *(REPOSITORY / "configs").glob("*.yaml")]
    paths += [*REPOSITORY.glob("*.py"), *(REPOSITORY / "modeling_gpt2_repro").rglob("*.py")]
    paths += (REPOSITORY / "benchmarks").glob("*.py")
    # A line broken inside a string, or between two strings, counts as one.
    return {str(path.relative_to(REPOSITORY)): re.sub(r'"?\n\s*(#\s|f?")?', " ", path.read_text()) for path in paths}


@pytest.mark.parametrize("name", sorted(list_texts()))
def test_programs_in_a_text_exist(name):
    text = list_texts()[name]
    for script in re.findall(r"\bpython3? (?:-\S+ )*([\w/]+\.py)", text):
        assert Path(script).is_file() or script == "x.py"
    for module, command in re.findall(r"\bpython3? -m\s+([\w.]+)(?: ([a-z]+))?", text):
        assert importlib.util.find_spec(module) is not None
        assert not module.startswith("modeling_gpt2_repro") or command in {*COMMANDS, ""}
    for target in re.findall(r"[`(]make ([a-z-]+)", text):
        assert target in find_targets()
    for path in re.findall(r"\b((?:configs|docs|examples|benchmarks|tests)/[\w/.]+\.(?:yaml|md|ipynb|py|json))", text):
        assert Path(path).exists() or "DEVICE" in path


@functools.cache
def list_flags(program: str) -> set[str]:
    """Return the names of a program's flags."""
    fields = dataclasses.fields(SETTINGS[program])
    aliases = {alias.removeprefix("--") for field in fields for alias in field.metadata["argparse"]["aliases"]}
    return {field.name for field in fields} | aliases | {"config", "help"}


@pytest.mark.parametrize("name", sorted(name for name in list_texts() if not name.startswith("benchmarks")))
def test_flags_in_a_text_exist(name):
    """After a script's name they must be the script's; elsewhere they may belong to any script."""
    text = list_texts()[name]
    for script in ("train.py", "prepare_data.py", "eval_hellaswag.py"):
        for given in re.findall(rf"(?<!bench_){re.escape(script)}((?: +--[a-z_]+(?:[ =][^\s`\"-][^\s`\"]*)?)+)", text):
            assert set(re.findall(r"--([a-z_]+)", given)) <= list_flags(script)
    if name != "Makefile":
        known = set().union(*map(list_flags, SETTINGS), FOREIGN_FLAGS)
        found = {flag.replace("-", "_") for flag in re.findall(r"(?<![\w-])--([a-z][a-z_-]*[a-z])\b", text)}
        assert found <= known


def test_examples_in_docstrings_of_scripts_are_valid():
    for path in REPOSITORY.glob("*.py"):
        lines = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
        for line in lines:
            if line.startswith(("python ", "accelerate ")):
                follow(read_commands(line)[0], {"runs/gpt2_124M"})


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_read_by_its_script(path):
    parse("prepare_data.py" if path.stem.endswith("_data") else "train.py", [f"--config={path}"])
    comments = " ".join(line.removeprefix("#").strip() for line in path.read_text().splitlines() if line[:1] == "#")
    for command in re.findall(r"((?:prepare_data|train)\.py (?:--\S+ ?(?:'[^']*'|[^\s-]\S*)? ?)+)", comments):
        program, *argv = read_commands(f"python {command.rstrip('., ')}")[0][1:]
        made = parse(program, argv)
        assert program != "prepare_data.py" or made.output_dir == parse("train.py", [f"--config={path}"]).data_dir


# The settings of a run, in a folder with `my books/` and `items.jsonl`.
ODD = 'it\'s "a"\n```\n~ $HOME `x` \\\\n'
CARDS = {
    "spaces, quotes and globs": (["my books/*.txt", "it's [1].txt"], "my data/$x", "my runs", ODD),
    "the default folder": (["my books"], "data/edu_fineweb10B", "runs", "Hello"),
    "absolute paths": (["{here}/my books"], "{here}/data", "{here}/runs", "~"),
}


@pytest.mark.heavy
@pytest.mark.parametrize("case", CARDS)
def test_the_commands_on_a_card_reproduce_its_run(tmp_path, monkeypatch, case):
    files, data_dir, output_dir, prompt = (
        [each.format(here=tmp_path / "first") for each in value] if isinstance(value, list) else value
        for value in CARDS[case]
    )
    data_dir, output_dir = (path.format(here=tmp_path / "first") for path in (data_dir, output_dir))
    names = ("my books/a.txt", "my books/b 2.txt", "it's [1].txt")
    for folder in (tmp_path / "first", tmp_path / "second", tmp_path / "second" / "PATH" / "TO"):
        for number, name in enumerate(names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            texts = [f"{number} {each} ships passed the lighthouse on the coast." for each in range(80)]
            (folder / name).write_text("\n-\n".join(texts))
        shutil.copy(SAMPLE_FILE, folder / "items.jsonl")
        write_tokenizer(folder / "own tokenizer")

    monkeypatch.chdir(tmp_path / "first")
    argv = ["--files", *files, f"--output_dir={data_dir}", "--document_separator=\n-\n", "--val_tokens=300"]
    if case != "the default folder":  # which GPT-2's tokenizer, the default, has to itself
        argv.append("--tokenizer=own tokenizer")
    assert prepare_data.main([*argv, "--num_workers=1"]) == 0
    monkeypatch.setattr(
        "modeling_gpt2_repro.training.run.choose_peak", lambda *_: Peak(1e9, "a test")
    )  # saves a second
    monkeypatch.setattr("train.CurveDrawer", mock.MagicMock())
    small = {
        "max_steps": 2,
        "hellaswag_every": 0,
        "sample_every": 0,
        "save_every": 0,
        "hellaswag_file": "items.jsonl",
        "sample_prompt": prompt,
        "sample_tokens": 32,
    }
    assert train.main(flags(data_dir, output_dir, "a run", **small)) == 0
    final = Path(output_dir, "a run", "final").absolute()
    config, data = dataclasses.asdict(RunFolder(final.parent).read_config()), read_tree(Path(data_dir))

    monkeypatch.chdir(tmp_path / "second")
    (commands,) = (block for block in list_blocks((final / "README.md").read_text()) if "prepare_data.py" in block)
    mains = {"prepare_data.py": prepare_data.main, "train.py": train.main}
    for program, script, *argv in read_commands(commands):
        assert program == "python" and mains.pop(script)(argv) == 0
    again = Path("runs/a run")
    assert not mains and read_tree(Path(RunFolder(again).read_config().data_dir)).keys() == data.keys()
    apart = {"data_dir", "output_dir", "report_to"} if "PATH/TO" in commands else {"output_dir", "report_to"}
    changes = {
        name for name, value in dataclasses.asdict(RunFolder(again).read_config()).items() if value != config[name]
    }
    assert changes <= apart
    weights = [(folder / "model.safetensors").read_bytes() for folder in (final, again / "final")]
    assert weights[0] == weights[1]


def read_tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_next_steps_after_the_demo_fit_each_other(tmp_path, monkeypatch, capsys):
    text = subprocess.run(["make", "--silent", "next-steps"], check=True, capture_output=True, text=True).stdout
    commands, made = read_commands(text), {"data/demo", "runs/demo"}
    for command in commands:
        follow(command, made)
    assert [command[1] for command in commands[1:]] == ["prepare_data.py", "train.py", "-m", "train.py"]
    assert "--plan" in commands[-1] and made >= {"data/books", "runs/books"}
    assert max(map(len, text.splitlines())) <= 80
    monkeypatch.chdir(tmp_path)  # a folder without data
    assert train.main([each.replace("configs/", f"{REPOSITORY}/configs/") for each in commands[-1][2:]]) == 0
    assert "19,073 steps" in capsys.readouterr().out


def test_commands_in_messages_can_be_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise ConnectionError("no network")

    monkeypatch.setattr("modeling_gpt2_repro.publishing.uploader.open_repository", refuse)
    messages: list[str] = []
    config = TrainingConfig(run_name="it's", hub_model_id="me/mine", hub_public=True)
    Uploader(RunFolder("my runs/it's"), config, is_enabled=True, say=messages.append).finish()
    (command,) = read_commands(re.search(r"python .*", messages[-1])[0])
    settings = parse(" ".join(command[2:4]), command[4:])
    assert settings.folder == "my runs/it's"
    assert (settings.repo_id, settings.public) == ("me/mine", True)
    with pytest.raises(ValueError) as error:
        open_split("it's not here", "train")
    (command,) = read_commands(re.search(r"prepare_data.py .*", str(error.value))[0])
    assert parse(command[0], command[1:]).output_dir == "it's not here"
