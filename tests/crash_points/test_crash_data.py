"""prepare_data.py survives being killed at, or a failure of, any system call that changes a file."""

from pathlib import Path

import pytest
from crashing import Crasher, CrashTests, Scenario, list_tree
from small_corpora import list_data_flags, write_corpus, write_tokenizer

import prepare_data

# The three stages in a row, as a scheduler runs them.
STAGES = """
import os, prepare_data
for stage in ("tokenize", "write", "all"):
    if code := prepare_data.main([*{flags!r}, f"--stage={{stage}}"]):
        os._exit(code)
"""
WAYS = ("new", "overwritten", "in stages")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    """Two text files, which form two tasks, and a tokenizer."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "texts").mkdir()
    write_corpus(folder / "texts" / "one.jsonl", 30)
    write_corpus(folder / "texts" / "two.jsonl", 50)
    return folder / "texts" / "*.jsonl", write_tokenizer(folder / "tokenizer")


@pytest.fixture(scope="module", params=WAYS)
def crasher(request, forks, inputs, tmp_path_factory) -> Crasher:
    folder = tmp_path_factory.mktemp("data")
    overwrites, in_stages = request.param == "overwritten", request.param == "in stages"

    def list_flags(here):
        return [*list_data_flags(*inputs, here / "data"), *(["--overwrite"] if overwrites else [])]

    old, new = {}, {}
    for tree, seed in ((old, 7), (new, 1337)):
        assert prepare_data.main([*list_flags(folder / "reference"), f"--seed={seed}", "--overwrite"]) == 0
        tree |= list_tree(folder / "reference" / "data")
    new["manifest.json"] = new["manifest.json"].replace(b"/reference/", b"/here/")

    def start(here):
        if overwrites:
            flags = list_data_flags(*inputs, here / "data")
            assert prepare_data.main([*flags, "--seed=7"]) == 0

    def check_kept(here, calls):
        found = list_tree(here / "data")
        for name in ("plan.json", "lock"):  # the next command removes them
            found.pop(name, None)
        assert found in ([old, new] if overwrites else [{}, new])

    def check_end(here, was_killed):
        assert {path.name for path in here.iterdir()} == {"data"}
        assert list_tree(here / "data") == new

    def script(here):
        return STAGES.format(flags=list_flags(here)) if in_stages else ""

    return Crasher(forks, Scenario("prepare_data", list_flags, start, check_kept, check_end, script), folder)


class TestData(CrashTests):
    share, at_least = 0.02, 30
