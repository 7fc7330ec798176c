"""Writing, replacing and removing files and folders survives a kill at, or a failure of, any system call."""

import textwrap

import pytest
from crashing import Crasher, CrashTests, Scenario, list_tree

from modeling_gpt2_repro.core.files import REPLACED_SUFFIX

OLD, NEW = {"a.txt": b"old a", "sub": b"", "sub/b.txt": b"old b"}, {"a.txt": b"new a", "sub": b"", "sub/c.txt": b"new"}
WRITE = "\n    ".join(
    ["(t / 'sub').mkdir()", "(t / 'a.txt').write_text('new a')", "(t / 'sub' / 'c.txt').write_text('new')"]
)
REPLACE = f"with files.create_folder_atomically(folder / 'model') as t:\n    {WRITE}"
SCRIPTS = {
    "a file": "with files.open_atomically(folder / 'file.txt') as stream:\n    stream.write('new')",
    "a folder": REPLACE,
    "a folder, names not being swapped": f"files._exchange = lambda one, other: False\n{REPLACE}",
    "a folder, removed": "files.remove_folder(folder / 'model')",
}


def write_tree(folder, tree):
    folder.mkdir()
    for name, content in tree.items():
        (folder / name).write_bytes(content) if content else (folder / name).mkdir()


def build(name: str, exists: bool) -> Scenario:
    is_file, is_removed = name == "a file", name.endswith("removed")

    def start(folder):
        if exists:
            (folder / "file.txt").write_text("old") if is_file else write_tree(folder / "model", OLD)

    def check_kept(folder, calls):
        if is_file:
            found = (folder / "file.txt").read_text() if (folder / "file.txt").exists() else None
            assert found in ("old", "new") or (not exists and found is None)
            return
        found = list_tree(folder / "model")
        # On file systems that cannot exchange names, the old folder briefly has the name from which it is restored.
        aside = "swapped" in name and list_tree(folder / f"model{REPLACED_SUFFIX}") == OLD
        assert found in (OLD, NEW) or (not found and (not exists or aside or is_removed))

    def check_end(folder, was_killed):
        expected = {"file.txt": b"new"} if is_file else {"model": b""} | {f"model/{n}": c for n, c in NEW.items()}
        assert list_tree(folder) == ({} if is_removed else expected)

    def script(folder):
        imports = (
            f"import os, pathlib\nfrom modeling_gpt2_repro.core import files\nfolder = pathlib.Path({str(folder)!r})\n"
        )
        return f"{imports}try:\n{textwrap.indent(SCRIPTS[name], '    ')}\nexcept OSError:\n    os._exit(2)"

    return Scenario("json", lambda folder: (), start, check_kept, check_end, script)


CASES = [(name, exists) for name in SCRIPTS for exists in (False, True) if exists or "removed" not in name]


@pytest.fixture(scope="module", params=CASES, ids=str)
def crasher(request, forks, tmp_path_factory) -> Crasher:
    return Crasher(forks, build(*request.param), tmp_path_factory.mktemp("files"))


class TestFiles(CrashTests):
    share, at_least = 0.2, 3
