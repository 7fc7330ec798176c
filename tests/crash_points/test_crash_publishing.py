"""Queueing checkpoints for publishing survives a kill at, or a failure of, any system call."""

import os

import pytest
from conftest import REPOSITORY
from crashing import Crasher, CrashTests, Scenario
from fork_server import QUICKER, serve_forks
from loopback_hub import LoopbackHub, User
from small_corpora import write_small_data
from test_crash_run import list_flags, read_weights

TOKEN, REPO = "hf_me0123456789", "models/me/run"
BARE = {"eval_every": 0, "sample_every": 0, "max_steps": 4}
TAGS = {"step-0000002", "step-0000004"}


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        hub.users = {TOKEN: User("me")}
        yield hub


@pytest.fixture(scope="module")
def crasher(hub, tmp_path_factory):
    data = write_small_data(tmp_path_factory.mktemp("data"))
    environment = {**os.environ, **hub.environment(tmp_path_factory.mktemp("home"))}
    environment |= {"PYTHONPATH": str(REPOSITORY), "HF_TOKEN": TOKEN}
    folder = tmp_path_factory.mktemp("run")
    with serve_forks(["train"], environment, QUICKER) as server:
        result = server.run("train", list_flags(data, folder, "whole", **BARE, keep_checkpoints=0), folder)
        assert result.code == 0, result.err

        def check_end(here, was_killed):
            repository = hub.repositories[REPO]
            assert repository.tags == TAGS if was_killed else repository.tags <= TAGS
            for tag in repository.tags:
                checkpoint = folder / "whole" / "checkpoints" / tag.replace("-", "_")
                assert hub.get_file(REPO, "model.safetensors", tag) == read_weights(checkpoint)
            assert hub.get_file(REPO, "model.safetensors") == read_weights(folder / "whole" / "final")
            assert not (here / "run" / "hub_upload").exists()

        scenario = Scenario(
            "train",
            lambda here: list_flags(data, here, **BARE, push_to_hub=True),
            lambda here: hub.repositories.pop(REPO, None),
            lambda here, calls: None,  # tested in test_crash_run.py
            check_end,
            about="run/hub_upload",
            is_racing=True,
        )
        yield Crasher(server, scenario, folder)


class TestPublishing(CrashTests):
    share, at_least = 0.02, 30
