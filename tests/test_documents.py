"""README, CONTRIBUTING and docs/: commands run, links have targets, and tables match the code."""

import ast
import itertools
import re
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY
from printed_commands import list_blocks, read_commands
from small_runs import SMALL
from test_architecture import LAYERS, PACKAGE

import eval_hellaswag
import prepare_data
import train
from modeling_gpt2_repro import __main__ as package
from modeling_gpt2_repro.data.prepare import config as preparation
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE
from modeling_gpt2_repro.training import config as training

DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
NAMES = [str(path.relative_to(REPOSITORY)) for path in DOCUMENTS]
# A script that begins with this, followed by a reason, is parsed by test_printed_commands but not run.
NOT_RUN = "# Not run by the tests: "
# Flags that shorten a command to a second.
TWO_STEPS = {"max_steps": 2, "eval_every": 1, "hellaswag_limit": 2, "save_every": 1, "micro_batch_size": 8}
QUICK = {
    "train.py": SMALL | TWO_STEPS,
    "prepare_data.py": {"num_workers": 1, "val_tokens": 600},
    "eval_hellaswag.py": {"data_file": SAMPLE_FILE, "limit": 2},
    "sample": {"n_samples": 1, "n_tokens": 16},
}
MAINS = {"train.py": train.main, "prepare_data.py": prepare_data.main, "eval_hellaswag.py": eval_hellaswag.main}
LOCAL_SOURCE = "--files=books/*.txt"  # instead of a dataset on the Hub
# Programs that only make sense in a checkout; the benchmarks' own tests run their scripts.
SKIPPED_PROGRAMS = {"make", "source"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, shards) -> Path:
    """A checkout with what the README's commands presuppose: books, finished runs and a log."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in (*MAINS, "configs", PACKAGE, "accelerate_config.yaml"):
        (folder / name).symlink_to(REPOSITORY / name)
    for name in ("books", "data", "log"):
        (folder / name).mkdir()
    for number in range(3):
        text = "\n\n".join(f"The keeper of lighthouse {number} counted {line} ships." for line in range(120))
        (folder / "books" / f"{number}.txt").write_text(text)
    (folder / "log" / "log.txt").write_text("".join(f"{step} train {6 - step / 100}\n" for step in range(256)))
    shutil.copytree(shards, folder / "data" / "demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("a", "b", "demo"):
            run("train.py", ["--data_dir=data/demo", f"--run_name={name}"])
        run_commands("README.md")
    return folder


def run_commands(name: str) -> None:
    """Run a document's commands, except those marked as not run."""
    for block in list_blocks((REPOSITORY / name).read_text()):
        commands = [] if block.startswith(NOT_RUN) else read_commands(block)
        for command in commands:
            if command[0] not in SKIPPED_PROGRAMS and not command[1].startswith("benchmarks/"):
                run(*find_program(command))


def run(program: str, argv: list[str]) -> None:
    """Run one of the project's commands in this process, with flags that shorten it."""
    quick = [f"--{name}={value}" for name, value in QUICK.get(program, {}).items()]
    if program == "prepare_data.py":
        if {"--verify", "--inspect"} & set(argv):
            quick = []
        elif "--files" not in argv:
            quick.append(LOCAL_SOURCE)
    if program in MAINS:
        assert MAINS[program]([*argv, *quick]) == 0
    else:
        assert package.main([program, *argv, *quick]) == 0


def find_program(command: list[str]) -> tuple[str, list[str]]:
    """Return the script or package command that a shell command runs, and its arguments."""
    if command[:3] == ["python", "-m", PACKAGE]:
        return command[3], command[4:]
    script = next(number for number, each in enumerate(command) if each in MAINS)
    assert command[0] in ("python", "accelerate", "torchrun")
    return command[script], command[script + 1 :]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "README.md"])
def test_the_commands_of_a_document_run(name, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    run_commands(name)


def test_the_commands_of_the_readme_have_their_documented_outputs(workspace):
    assert (workspace / "data" / "edu_fineweb10B" / "manifest.json").is_file()
    for name in ("gpt2_124M", "gpt2_124M_one_gpu", "books"):
        assert (workspace / "runs" / name / "final" / "model.safetensors").is_file()


def test_failing_commands_are_detected(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    for script in ("python train.py --data_dir nowhere", "python -m modeling_gpt2_repro summary runs/nowhere"):
        with pytest.raises(AssertionError):
            run(*find_program(read_commands(script)[0]))


def list_anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a Markdown text."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_the_links_of_a_document_have_targets(name):
    path = REPOSITORY / name
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    for link in links:
        target, _, anchor = link.partition("#")
        if target.startswith("https://"):
            continue
        found = (path.parent / target).resolve() if target else path
        assert found.exists() and found.is_relative_to(REPOSITORY), link
        assert not anchor or anchor in list_anchors(found.read_text()), link


def test_every_page_is_linked_from_the_readme():
    readme = (REPOSITORY / "README.md").read_text()
    assert all(f"({name})" in readme for name in NAMES if name != "README.md")


def test_the_table_of_layers_matches_the_tests():
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    table = text.split("## The layers")[1].split("\n## ")[0]
    rows = [re.findall(r"`([\w/.]+)`", row.split("|")[1]) for row in re.findall(r"^\| `.*", table, re.MULTILINE)]
    layers = [{name.removesuffix(".py").strip("/").replace("/", ".") for name in row} for row in rows]
    # Modules that only re-export, or that start the commands, have no row.
    expected = [set(names) - {"__init__", "__main__"} for names in LAYERS]
    assert layers == [names for names in expected if names]
    assert all(first.isdisjoint(second) for first, second in itertools.combinations(layers, 2))


def list_messages() -> str:
    """Return every string in the code, one per line, with `…` for interpolated values."""

    def read(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(map(read, node.values))
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"

    paths = [*(REPOSITORY / name for name in MAINS), *(REPOSITORY / PACKAGE).rglob("*.py")]
    nodes = (node for path in paths for node in ast.walk(ast.parse(path.read_text())))
    return "\n".join(read(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr))


def test_documented_messages_exist():
    text = (REPOSITORY / "docs" / "troubleshooting.md").read_text().split("## By message")[1]
    messages, known = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE), list_messages()
    assert len(messages) > 20
    assert not [message for message in messages if message not in known]


def test_the_flags_of_other_projects_are_answered_with_ours():
    """Except for llm.c's, which are single letters."""
    text = (REPOSITORY / "docs" / "coming-from.md").read_text().partition("## How we compare")[0]
    cells = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    flags = {name.replace("-", "_") for cell in cells for name in re.findall(r"`(?:--)?([a-z][a-z_-]+)`", cell)}
    ours = training.TrainingConfig.__dataclass_fields__.keys() | preparation.PrepareConfig.__dataclass_fields__.keys()
    assert len(flags) > 50
    assert flags - ours - {"torchrun"} <= training.FOREIGN_FLAGS.keys() | preparation.FOREIGN_FLAGS.keys()
