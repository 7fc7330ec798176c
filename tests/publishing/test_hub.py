"""Runs on the Hub: published to, loaded from and scored on a local fake Hub, by processes that know no other."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from fork_server import QUICKER, serve_forks
from loopback_hub import LoopbackHub, User
from safetensors.torch import load
from small_runs import flags, list_launch_command, read_losses, run_training

from modeling_gpt2_repro.__main__ import main
from modeling_gpt2_repro.evaluation.hellaswag_data import DATASET_NAME, DATASET_REVISION, SAMPLE_FILE
from modeling_gpt2_repro.model.folder import save_published_model

ME, READER, STRANGER = "hf_me0123456789", "hf_reader0123456789", "hf_stranger0123456789"
COMMANDS = "modeling_gpt2_repro.__main__"
TINY = "models/me/tiny"
TAGS = {"step-0000006", "step-0000012"}
# Skip what only takes time here.
QUICK = {"eval_every": 0, "hellaswag_every": 0, "sample_every": 0}


@pytest.fixture(scope="module")
def hub(tokenizer, tmp_path_factory):
    """A Hub with the tokenizer and items that scripts download, and with repositories of other owners."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    with LoopbackHub() as hub:
        hub.users = {
            ME: User("me", ("team",)),
            READER: User("me", role="read"),
            STRANGER: User("stranger"),
        }
        hub.commit("models/openai-community/gpt2", {path.name: path.read_bytes() for path in folder.iterdir()})
        hub.commit("models/stranger/public", {"README.md": b"Theirs."})
        hub.commit("models/me/bert", {"config.json": b"{}", "model.safetensors": b"another model"})
        hub.commit("datasets/me/corpus", {"train.jsonl": b"{}"})
        items = SAMPLE_FILE.read_bytes()
        card = b"---\nconfigs:\n- config_name: default\n  data_files: [{split: validation, path: data.jsonl}]\n---\n"
        # Later commits than the pinned revision do not matter.
        hub.commit(f"datasets/{DATASET_NAME}", {"README.md": card, "data.jsonl": items}, sha=DATASET_REVISION)
        hub.commit(f"datasets/{DATASET_NAME}", {"data.jsonl": b"{}"})
        yield hub


@pytest.fixture(autouse=True)
def _healthy(hub):
    theirs = set(hub.repositories)
    hub.start()
    hub.heal()
    hub.forget_requests()
    yield
    hub.start()
    for key in set(hub.repositories) - theirs - {TINY}:
        del hub.repositories[key]


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    return {**os.environ, **hub.environment(home), "PYTHONPATH": str(REPOSITORY), "HF_TOKEN": ME}


@pytest.fixture(scope="module")
def server(environment):
    with serve_forks(["train", "eval_hellaswag", COMMANDS], environment, QUICKER) as server:
        yield server


@pytest.fixture
def run(server, tmp_path):
    """Return a function that runs a module's `main` in a separate process with a token, which must not be printed."""

    def run(module, *argv, token=ME, **environment):
        result = server.run(module, argv, tmp_path, {"HF_TOKEN": token, **environment})
        assert not token or token not in result.out + result.err
        return result

    return run


@pytest.fixture(scope="module")
def finished_run(shards, tmp_path_factory) -> Path:
    return run_training(shards, tmp_path_factory.mktemp("runs"), "tiny", sample_every=0)


@pytest.fixture(scope="module")
def published(finished_run, server, tmp_path_factory) -> Path:
    """The finished run, published as me/tiny with all its checkpoints."""
    result = server.run(COMMANDS, ["publish", finished_run, "--checkpoints"], tmp_path_factory.mktemp("out"))
    assert result.code == 0, result.err
    return finished_run


def read_weights(source) -> dict[str, torch.Tensor]:
    return load(source if isinstance(source, bytes) else (source / "model.safetensors").read_bytes())


def check_same_weights(ours, theirs) -> None:
    ours, theirs = read_weights(ours), read_weights(theirs)
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def check_is_one_line(result, reason, program="modeling_gpt2_repro"):
    assert result.code == 2, result.err
    (line,) = result.err.splitlines()
    assert line.startswith(f"{program}: error: ") and reason in line, line


# The command


def test_main_and_tags_contain_the_published_models(hub, published, tokenizer):
    repository = hub.repositories[TINY]
    assert repository.private
    assert repository.tags == TAGS
    files = set(repository.commits[repository.resolve("main")])
    assert files == {path.name for path in (published / "final").iterdir()} | {".gitattributes", "curves.png"}
    assert {"modeling_gpt2_repro.py", "configuration_gpt2_repro.py", "generation_config.json", "README.md"} <= files
    for revision in ("main", *TAGS):
        assert json.loads(hub.get_file(TINY, "config.json", revision))["model_type"] == "gpt2"
        step = revision.replace("-", "_")
        folder = published / "final" if revision == "main" else published / "checkpoints" / step
        check_same_weights(hub.get_file(TINY, "model.safetensors", revision), folder)
    # Both forms of a model have the same configuration.
    ours = json.loads(hub.get_file(TINY, "config.json", "step-0000012"))
    theirs = json.loads(hub.get_file(TINY, "config.json"))
    assert {name: ours[name] for name in theirs if not name.startswith("_")} == {
        name: value for name, value in theirs.items() if not name.startswith("_")
    }


LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
is_trusted = sys.argv[1] == "ours"
tokenizer = AutoTokenizer.from_pretrained("me/tiny")
for revision in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained("me/tiny", revision=revision, trust_remote_code=is_trusted)
    logits = model(**tokenizer("The old lighthouse", return_tensors="pt")).logits
    print(type(model).__module__.split(".")[0], type(model).__name__, logits.abs().sum().item())
assert not any(name == "modeling_gpt2_repro" or name.startswith("modeling_gpt2_repro.") for name in sys.modules)
"""


@pytest.mark.usefixtures("published")
def test_the_repository_loads_in_fresh_processes_as_gpt2_and_as_ours(environment, tmp_path):
    """Neither process can import this package."""
    bare = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, *argv],
            env=bare | {"HF_HOME": str(tmp_path / argv[0])},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for argv in (["stock", "main", "step-0000006"], ["ours", "main"])
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    stock, tagged, ours = (line.split() for out, _ in outputs for line in out.splitlines())
    assert stock[:2] == tagged[:2] == ["transformers", "GPT2LMHeadModel"]
    assert ours[:2] == ["transformers_modules", "GPT2ReproForCausalLM"]
    assert float(ours[2]) == pytest.approx(float(stock[2]), rel=1e-4)
    assert float(tagged[2]) != pytest.approx(float(stock[2]), rel=1e-4)


def test_hellaswag_is_downloaded_and_scored_on_a_repository(run, published, tmp_path):
    """Only the model's id is given; the dataset's revision is the pinned one."""
    output = tmp_path / "scores.json"
    result = run("eval_hellaswag", "--model", "me/tiny", "--limit", 8, "--output", output)
    assert result.code == 0, result.err
    assert "me/tiny" in result.out
    scores = json.loads(output.read_text())
    assert (scores["model"], scores["data"], scores["original"]["n"]) == ("me/tiny", DATASET_NAME, 8)
    # Score the repository, and the folder that it was published from, on items in a file.
    found = []
    for model, prefix in (("me/tiny", "me/tiny (float32)"), (published / "final", f"{published / 'final'} (float32)")):
        examples = tmp_path / "examples.jsonl"
        items = ["--data_file", SAMPLE_FILE, "--limit", 8, "--output", output, "--per_example", examples]
        file = run("eval_hellaswag", "--model", model, *items)
        assert file.code == 0 and file.out.startswith(prefix), file.err
        assert json.loads(output.read_text())["lm_eval"]["acc"] == scores["lm_eval"]["acc"]
        found.append(examples.read_bytes())
    assert found[0] == found[1]


def test_unchanged_files_are_not_uploaded_again(hub, published, run, tmp_path):
    repository = hub.repositories[TINY]
    before = dict(repository.references)
    assert run(COMMANDS, "publish", published, "--repo_id", "me/tiny", "--checkpoints").code == 0
    assert hub.count_requests("", "PUT") == hub.count_requests("/commit/") == hub.count_requests("/tag/") == 0
    assert repository.references == before

    changed = tmp_path / "tiny"
    shutil.copytree(published, changed)
    (changed / "curves.png").write_bytes(b"another picture")
    assert run(COMMANDS, "publish", changed).code == 0
    assert hub.count_requests("/lfs/", "PUT") == 1
    assert hub.get_file(TINY, "curves.png") == b"another picture"
    assert repository.references["step-0000006"] == before["step-0000006"]
    assert run(COMMANDS, "publish", published).code == 0  # restore it for the other tests


@pytest.mark.slow
def test_tags_move_to_a_new_run_of_the_same_name(hub, published, run, tmp_path, shards):
    assert run(COMMANDS, "publish", published, "--repo_id", "me/moved", "--checkpoints").code == 0
    other = run_training(shards, tmp_path, "tiny", seed=1, **QUICK)
    hub.repositories["models/me/moved"].objects["x"] = b""  # stored objects are kept
    assert run(COMMANDS, "publish", other, "--repo_id", "me/moved", "--checkpoints").code == 0
    step_6 = other / "checkpoints" / "step_0000006"
    check_same_weights(hub.get_file("models/me/moved", "model.safetensors", "step-0000006"), step_6)
    check_same_weights(hub.get_file("models/me/moved", "model.safetensors"), other / "final")


def test_stale_files_are_deleted_and_foreign_files_kept(hub, published, run, tmp_path):
    changed = tmp_path / "tiny"
    shutil.copytree(published, changed)
    (changed / "final" / ".eval_results").mkdir()
    (changed / "final" / ".eval_results" / "x.yaml").write_text("x")
    (changed / "final" / ".secret").write_text("x")
    assert run(COMMANDS, "publish", changed, "--repo_id", "me/parts").code == 0
    hub.commit("models/me/parts", {"LICENSE": b"mine", "model-00001-of-00002.safetensors": b"old"})
    assert ".eval_results/x.yaml" in (tree := hub.repositories["models/me/parts"].commits[hub_head(hub, "me/parts")])
    assert ".secret" not in tree
    assert run(COMMANDS, "publish", published, "--repo_id", "me/parts").code == 0
    tree = set(hub.repositories["models/me/parts"].commits[hub_head(hub, "me/parts")])
    assert "LICENSE" in tree
    assert not tree & {".eval_results/x.yaml", "model-00001-of-00002.safetensors"}


def test_a_folder_that_is_named_like_a_weight_file_is_not_taken_for_it(hub, published, run):
    """Its entry on the Hub has no checksum."""
    key, tag = "models/me/folders", "step-0000006"
    hub.commit(key, {"modeling_gpt2_repro.py": b"", "model.safetensors/shard": b"theirs"}, branch="theirs")
    hub.tag(key, tag, "theirs")
    hub.commit(key, {"modeling_gpt2_repro.py": b""})
    assert run(COMMANDS, "publish", published, "--repo_id", "me/folders", "--checkpoints").code == 0
    weights = hub.get_file(key, "model.safetensors", tag)
    check_same_weights(weights, published / "checkpoints" / "step_0000006")


def hub_head(hub, repo_id: str) -> str:
    return hub.repositories[f"models/{repo_id}"].references["main"]


@pytest.mark.parametrize("failure", ["reset", "500", "gone"])
def test_an_interrupted_upload_is_resumed(hub, finished_run, run, failure):
    hub.fail("/lfs/", failure)
    check_is_one_line(run(COMMANDS, "publish", finished_run, "--repo_id", "me/broken"), "the upload failed: ")
    repository = hub.repositories["models/me/broken"]
    assert set(repository.commits[repository.resolve("main")]) == {".gitattributes"}  # a model is complete or absent
    hub.start()
    hub.heal()
    assert run(COMMANDS, "publish", finished_run, "--repo_id", "me/broken").code == 0
    check_same_weights(hub.get_file("models/me/broken", "model.safetensors"), finished_run / "final")


def test_later_checkpoints_do_not_move_main(hub, finished_run, run):
    """Check this also when the upload fails after the first of them."""
    argv = finished_run, "--repo_id", "me/later"
    assert run(COMMANDS, "publish", *argv).code == 0
    repository, finished = hub.repositories["models/me/later"], hub_head(hub, "me/later")
    hub.fail("/tag/", "500")
    check_is_one_line(run(COMMANDS, "publish", *argv, "--checkpoints"), "the upload failed: ")
    assert hub_head(hub, "me/later") == finished and not repository.tags
    hub.heal()
    assert run(COMMANDS, "publish", *argv, "--checkpoints").code == 0
    assert hub_head(hub, "me/later") == finished and set(repository.references) == {"main", *TAGS}
    for tag in TAGS:
        folder = finished_run / "checkpoints" / tag.replace("-", "_")
        check_same_weights(hub.get_file("models/me/later", "model.safetensors", tag), folder)


@pytest.mark.parametrize("failure", ["500", "reset", "slow"])
def test_transient_errors_of_the_hub_are_retried(hub, finished_run, run, failure):
    hub.fail("/lfs/", failure, times=2)
    assert run(COMMANDS, "publish", finished_run, "--repo_id", "team/tiny").code == 0
    check_same_weights(hub.get_file("models/team/tiny", "model.safetensors"), finished_run / "final")


def test_the_repository_is_private_by_default(hub, finished_run, run):
    for flag, is_private in (([], True), (["--public"], False), ([], False)):
        assert run(COMMANDS, "publish", finished_run, "--repo_id", "me/seen", *flag).code == 0
        assert hub.repositories["models/me/seen"].private is is_private


MISTAKES = {
    "no token": (["--repo_id=me/new"], "", "run `hf auth login` or set HF_TOKEN"),
    "expired token": (["--repo_id=me/new"], "hf_expired0123456789", "the token: the Hub denied access (401"),
    "read-only token": (["--repo_id=me/new"], READER, "me has no write access to me/new"),
    "foreign namespace": (["--repo_id=stranger/new"], ME, "no write access to stranger/new: pass a --repo_id of"),
    "foreign repository": (["--repo_id=stranger/public"], ME, "me has no write access to stranger/public"),
    "dataset": (["--repo_id=me/corpus"], ME, "me/corpus is a dataset, not a model: pass another --repo_id"),
    "another model": (["--repo_id=bert"], ME, "me/bert does not look like a model from this package"),
    "name": (["--repo_id=me/a/b"], ME, "nor a valid Hub id"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gives_one_line_and_leaves_nothing(hub, finished_run, run, case):
    argv, token, reason = MISTAKES[case]
    before = {key: dict(repository.references) for key, repository in hub.repositories.items()}
    check_is_one_line(run(COMMANDS, "publish", finished_run, *argv, token=token), reason)
    assert {key: dict(repository.references) for key, repository in hub.repositories.items()} == before


def test_unreachable_hub_and_folders_without_a_finished_run(hub, finished_run, run, tmp_path, capsys):
    (tmp_path / "begun").mkdir()
    check_is_one_line(run(COMMANDS, "publish"), "the following arguments are required: RUN")
    check_is_one_line(run(COMMANDS, "publish", tmp_path / "begun"), "is not a run folder")
    shutil.copy(finished_run / "config.yaml", tmp_path / "begun")
    check_is_one_line(run(COMMANDS, "publish", tmp_path / "begun"), "has no final/: pass the folder of a finished run")
    hub.stop()
    check_is_one_line(run(COMMANDS, "publish", finished_run), "the upload failed: ")
    for argv in ([finished_run], ["--checkpoints", finished_run]):
        assert main(["publish", *map(str, argv)]) == 2  # in this process, which is offline
        assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


# During training


def read_all(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_run_publishes_its_checkpoints_and_its_final_model(hub, run, shards, tmp_path):
    result = run("train", *flags(shards, tmp_path, "mine", push_to_hub=True, keep_checkpoints=1, sample_every=0))
    assert result.code == 0, result.err
    assert f"published   {hub.url}/me/mine" in result.out
    repository, folder = hub.repositories["models/me/mine"], tmp_path / "mine"
    assert repository.private and repository.tags == TAGS
    check_same_weights(hub.get_file("models/me/mine", "model.safetensors"), folder / "final")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_0000012"]
    assert not (folder / "hub_upload").exists()
    card = hub.get_file("models/me/mine", "README.md", "step-0000006").decode()
    assert "checkpoint after 6 updates" in card and "--push_to_hub" not in card
    assert ME.encode() not in read_all(folder) + b"".join(b"".join(t.values()) for t in repository.commits.values())


def test_no_step_waits_for_an_upload(hub, run, shards, tmp_path):
    """The Hub does not answer until the run has made its last update and written its final model."""
    hub.fail("/lfs/models/", "held")
    argv = flags(shards, tmp_path, "held", push_to_hub=True, keep_checkpoints=1, **QUICK)
    folder = tmp_path / "held"
    with ThreadPoolExecutor() as pool:
        result = pool.submit(run, "train", *argv)
        try:
            wait_until(lambda: (folder / "final").is_dir() or result.done())
            assert not result.done(), result.result().err
            assert set(read_losses(folder)) == set(range(1, 13))
            assert not hub.repositories["models/me/held"].tags
            # The first checkpoint was pruned, but its upload is still queued.
            assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_0000012"]
            assert {path.name for path in (folder / "hub_upload").iterdir()} == {"step_0000006", "step_0000012"}
        finally:
            hub.heal()
    assert result.result().code == 0, result.result().err
    assert hub.repositories["models/me/held"].tags == TAGS
    assert not (folder / "hub_upload").exists()


def wait_until(is_true, seconds=300) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_preempted_run_does_not_wait_for_an_upload(hub, environment, run, shards, tmp_path):
    hub.fail("/lfs/models/", "held")
    # Curves make it two large files.
    endless = {**QUICK, "push_to_hub": True, "lr_schedule": "constant", "save_every": 20, "eval_every": 1000}
    endless |= {"keep_checkpoints": 1}  # else the run needs 65 GB
    argv = flags(shards, tmp_path, "stopped", max_steps=100_000, **endless)
    command, n_held = [sys.executable, "train.py", *argv], hub.n_held
    process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: hub.n_held > n_held or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 75
    finally:
        process.kill()
        process.wait()
    waiting = sorted(path.name for path in (tmp_path / "stopped" / "hub_upload").iterdir())
    assert waiting and not hub.repositories["models/me/stopped"].tags
    hub.heal()
    # Pending uploads are completed when the run resumes.
    last = int(waiting[-1].removeprefix("step_"))
    assert run("train", *flags(shards, tmp_path, "stopped", max_steps=last, **endless)).code == 0
    assert {name.replace("_", "-") for name in waiting} <= hub.repositories["models/me/stopped"].tags


@pytest.mark.slow
def test_a_failed_upload_is_reported_once_and_retried(hub, run, shards, tmp_path):
    hub.fail("/commit/", "500", times=1)
    result = run("train", *flags(shards, tmp_path, "mended", push_to_hub=True, **QUICK))
    assert result.code == 0, result.err
    assert result.out.count("publishing failed; training continues, retrying later: the Hub returned 500") == 1
    assert hub.repositories["models/me/mended"].tags == TAGS


def test_a_run_finishes_without_the_hub(hub, run, shards, tmp_path, finished_run):
    """The Hub vanishes during the first upload; once it is back, the same command publishes the whole run."""
    hub.fail("/lfs/", "gone")
    argv = flags(shards, tmp_path, "gone", push_to_hub=True, **QUICK)
    result = run("train", *argv)
    assert result.code == 0, result.err
    assert result.out.count("publishing failed; training continues") == 1
    assert result.out.count("the run is finished, but publishing failed: the connection to the Hub failed") == 1
    assert read_losses(tmp_path / "gone") == read_losses(finished_run)
    hub.start()
    hub.heal()
    result = run("train", *argv)
    assert result.code == 0, result.err
    assert "is finished" in result.out and "published   " in result.out
    assert hub.repositories["models/me/gone"].tags == TAGS


def test_a_mistake_is_reported_before_the_first_step(hub, run, shards, tmp_path):
    run_training(shards, tmp_path, "old", **QUICK)
    before = read_all(tmp_path / "old")
    again = {"resume_from_checkpoint": "never", "push_to_hub": True, **QUICK}
    for change, token, reason in (
        ({}, "", "run `hf auth login`"),
        ({"hub_model_id": "stranger/new"}, ME, "pass a --hub_model_id of your own"),
        ({"hub_model_id": "me/corpus"}, ME, "me/corpus is a dataset"),
        ({}, READER, "no write access"),
    ):
        check_is_one_line(
            run("train", *flags(shards, tmp_path, "old", **again, **change), token=token), reason, "train.py"
        )
    hub.stop()
    result = run("train", *flags(shards, tmp_path, "old", **again))
    check_is_one_line(result, "--push_to_hub cannot reach the Hub", "train.py")
    assert read_all(tmp_path / "old") == before


@pytest.mark.slow
def test_a_run_resumes_without_the_hub(hub, run, shards, tmp_path):
    argv = {"max_steps": 6, "lr_schedule": "constant", **QUICK}
    run_training(shards, tmp_path, "late", **argv)
    hub.stop()
    result = run("train", *flags(shards, tmp_path, "late", push_to_hub=True, **{**argv, "max_steps": 12}))
    assert result.code == 0, result.err
    assert result.out.count("publishing failed; training continues") == 1
    assert len(read_losses(tmp_path / "late")) == 12


@pytest.mark.slow
def test_one_of_several_processes_publishes(hub, environment, shards, tmp_path):
    command = list_launch_command(2, flags(shards, tmp_path, "shared", push_to_hub=True, **QUICK))
    result = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    assert "2 process(es)" in result.stdout
    assert hub.count_requests("/api/repos/create") == hub.count_requests("/whoami-v2") == 1
    assert hub.repositories["models/me/shared"].tags == TAGS
    check_same_weights(hub.get_file("models/me/shared", "model.safetensors"), tmp_path / "shared" / "final")


def test_the_published_form_is_the_same_from_files_and_from_a_model(published, hub, tokenizer, tmp_path):
    """Converting a checkpoint's files gives the same as `save_published_model` of its model."""
    from modeling_gpt2_repro import GPT2ReproForCausalLM

    checkpoint = published / "checkpoints" / "step_0000012"
    save_published_model(tmp_path / "model", GPT2ReproForCausalLM.from_pretrained(checkpoint), tokenizer)
    expected = json.loads((tmp_path / "model" / "config.json").read_text())
    config = json.loads(hub.get_file(TINY, "config.json", "step-0000012"))
    assert {k: v for k, v in config.items() if k[0] != "_"} == {k: v for k, v in expected.items() if k[0] != "_"}
