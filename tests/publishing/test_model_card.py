"""The model card: what it reports, for whom, and what it must not reveal."""

import json
import os
import shlex
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import prepare_data
from modeling_gpt2_repro.core.arguments import parse_arguments, write_config
from modeling_gpt2_repro.data.prepare.config import PrepareConfig
from modeling_gpt2_repro.model.folder import identify_weights
from modeling_gpt2_repro.publishing.hub import collect_model
from modeling_gpt2_repro.publishing.model_card import CARD, describe_model, quote_text, write_model_card
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    texts = [f"{number} lighthouses stood on the coast." for number in range(300)]
    (folder / "secret_place.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    argv = ["--files", folder / "secret_place.jsonl", "--output_dir", folder / "out", "--val_tokens", 100]
    argv += ["--num_workers", 1, "--seed", 0]
    assert prepare_data.main([*map(str, argv)]) == 0
    return folder / "out"


@pytest.fixture
def run_folder(tmp_path, data_folder):
    """A run with two evaluations, the first of them at step 2."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = TrainingConfig(
        data_dir=str(data_folder),
        output_dir=str(tmp_path),
        run_name="run",
        max_steps=4,
        tf32=False,
        hellaswag_file="my/items.jsonl",
        sample_prompt='Say "hello" to',
        push_to_hub=True,
        hub_model_id="somebody/something",
    )
    write_config(config, folder / "config.yaml")
    lines = [
        *({"step": step, "train/loss": 9.0 - step, "train/tokens": 524288 * step} for step in range(1, 5)),
        {"step": 2, "val/loss": 7.25, "val/bpb": 3.5, "hellaswag/acc_norm": 0.2604},
        {"step": 4, "val/loss": 5.25, "val/bpb": 2.5, "train/epoch": 0.5},
        {"step": 4, "hellaswag/acc_norm": 0.2708, "hellaswag/acc_norm_stderr": 0.0649, "hellaswag/n": 48},
        {"step": 4, "train/tokens_per_second": 524288.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "val/lo')
    samples = [{"step": 2, "text": "early words"}, {"step": 4, "text": "last <b>words</b> | `x` [y](z)"}]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    (folder / "curves.png").write_bytes(b"a picture")
    (folder / "final").mkdir()
    (folder / "final" / "config.json").write_text(json.dumps({"n_layer": 2, "n_head": 4, "n_embd": 64}))
    return folder


def write_scores(run_folder, name="hellaswag.json", **changes):
    scores = {"acc": 0.25, "acc_stderr": 0.0625, "acc_norm": 0.5, "acc_norm_stderr": 0.125, "n": 1042}
    both = {protocol: {**scores, "protocol": "x"} for protocol in ("original", "lm_eval")}
    content = {"model": str(run_folder / "final"), "data": "Rowan/hellaswag", **both, **changes}
    (run_folder / name).write_text(json.dumps(content))


def render_card(folder, run_folder, **arguments) -> str:
    return describe_model(folder, RunFolder(run_folder), **arguments)[CARD]


def read_table(text: str) -> dict[str, str]:
    rows = [line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| ") and " | " in line]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def test_the_card_reports_data_model_training_and_results(run_folder):
    write_scores(run_folder)
    write_model_card(run_folder / "final", RunFolder(run_folder))
    assert (run_folder / "final" / "curves.png").read_bytes() == b"a picture"
    text = (run_folder / "final" / "README.md").read_text()
    table = read_table(text)
    assert table["validation loss"] == "5.2500 nats per token, 2.5000 bits per byte"
    assert (
        table["items.jsonl: acc_norm, protocol `original`, in training"] == "0.2708 ± 0.0649 (chance 0.25, 48 items)"
    )
    for protocol in ("original", "lm_eval"):
        name = f"Rowan/hellaswag: acc_norm, protocol `{protocol}`"
        assert table[name] == "0.5000 ± 0.1250 (chance 0.25, 1,042 items)"
    assert table["source"] == "1 local file(s), 300 documents"
    assert table["training split"].startswith("2,") and "tokens" in table["training split"]
    assert table["order"] == "documents shuffled, seed 0"
    assert (table["blocks"], table["attention heads"], table["width"]) == ("2", "4", "64")
    assert table["updates"] == "4, each of 524,288 tokens"
    assert table["learning rate"] == "0.0006, linear warmup over 375,000,000 tokens, then cosine to 0.1 of the peak"
    assert table["tokens seen"] == "2,097,152 (0.500 epochs)"
    assert table["time"].startswith("1 s of updates")
    assert "![Curves of the run](curves.png)" in text
    for title in ("Use", "Limits and biases", "Reproduce", "Samples"):
        assert f"\n## {title}\n" in text
    assert "early words" not in text


def test_a_constant_learning_rate_has_no_end_on_the_card(run_folder):
    settings = yaml.safe_load((run_folder / "config.yaml").read_text())
    (run_folder / "config.yaml").write_text(yaml.safe_dump(settings | {"lr_schedule": "constant"}))
    assert read_table(render_card(run_folder / "final", run_folder))["learning rate"].endswith("tokens, then constant")


def test_commands_on_the_card_reproduce_the_run(run_folder, data_folder):
    """Their flags, parsed, give the settings, except for the run's folder and its trackers."""
    text = render_card(run_folder / "final", run_folder)
    prepare, training = text.split("```bash\n")[1].split("\n```")[0].splitlines()
    assert prepare.startswith("python prepare_data.py ") and training.startswith("python train.py ")
    settings = parse_arguments(PrepareConfig, shlex.split(prepare)[2:], description="")
    assert (settings.val_tokens, settings.seed, settings.files) == (100, 0, ["PATH/TO/secret_place.jsonl"])
    assert settings.output_dir == f"PATH/TO/{data_folder.name}"
    config = parse_arguments(TrainingConfig, shlex.split(training)[2:], description="")
    assert (config.max_steps, config.tf32, config.sample_prompt) == (4, False, 'Say "hello" to')
    assert (config.data_dir, config.push_to_hub) == (f"PATH/TO/{data_folder.name}", False)
    assert str(data_folder.parent) not in text and "somebody/something" not in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text


def test_only_paths_outside_the_working_folder_are_shortened(run_folder):
    changes = {
        "sample_prompt": "/imagine a cat/dog",
        "hellaswag_file": "../mine/items.jsonl",
        "init_from": "~/me/base",
    }
    settings = yaml.safe_load((run_folder / "config.yaml").read_text())
    (run_folder / "config.yaml").write_text(yaml.safe_dump(settings | changes | {"data_dir": "data/corpus"}))
    text = render_card(run_folder / "final", run_folder)
    training = text.split("```bash\n")[1].split("\n```")[0].splitlines()[-1]
    config = parse_arguments(TrainingConfig, shlex.split(training)[2:], description="")
    assert (config.sample_prompt, config.data_dir) == ("/imagine a cat/dog", "data/corpus")
    assert (config.hellaswag_file, config.init_from) == ("PATH/TO/items.jsonl", "PATH/TO/base")
    assert "mine" not in text and "~/me" not in text


def test_versions_are_those_at_the_end_of_the_run(run_folder):
    (run_folder / "status.json").write_text(json.dumps({"status": "finished", "versions": {"torch": "1.0"}}))
    assert ": torch 1.0. " in render_card(run_folder / "final", run_folder)


def test_the_hub_parses_the_metadata(run_folder):
    text = render_card(run_folder / "final", run_folder, repo_id="me/gpt2")
    card = ModelCard(text)
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-generation", "transformers")
    metadata = yaml.safe_load(text.split("---\n")[1])
    (model,) = metadata["model-index"]
    assert model["name"] == "gpt2"
    metrics = {metric["type"]: metric["value"] for result in model["results"] for metric in result["metrics"]}
    assert metrics == {"loss": 5.25, "bits_per_byte": 2.5}
    assert card.data.eval_results and "from_pretrained(folder)" in text and 'folder = "me/gpt2"' in text
    assert card.data.datasets is None  # local files are not a dataset on the Hub
    # Without results there is no index, as tools reject an empty one.
    (run_folder / "metrics.jsonl").unlink()
    assert "model-index" not in render_card(run_folder / "final", run_folder)


def read_index(text: str) -> dict[str, float]:
    """Return the scores in a card's `model-index`, by protocol and metric."""
    results = ModelCard(text).data.eval_results
    return {(r.metric_args["protocol"], r.metric_type): r.metric_value for r in results if r.metric_args}


def test_scores_on_the_full_validation_set_are_reported_as_hellaswag(run_folder):
    """These are in the index and in separate files; scores on other items are only in the table."""
    write_scores(run_folder)
    write_model_card(run_folder / "final", RunFolder(run_folder))
    assert read_index((run_folder / "final" / "README.md").read_text()) == {}
    assert not (run_folder / "final" / ".eval_results").exists()

    write_scores(run_folder, is_validation_split=True)
    write_model_card(run_folder / "final", RunFolder(run_folder))
    expected = {(protocol, "acc"): 0.25 for protocol in ("original", "lm_eval")}
    expected |= {(protocol, "acc_norm"): 0.5 for protocol in ("original", "lm_eval")}
    assert read_index((run_folder / "final" / "README.md").read_text()) == expected
    for protocol in ("original", "lm_eval"):
        (entry,) = yaml.safe_load((run_folder / "final" / ".eval_results" / f"hellaswag_{protocol}.yaml").read_text())
        assert (entry["dataset"]["id"], entry["value"]) == ("Rowan/hellaswag", 0.5)


def test_a_run_scored_on_the_full_set_reports_it(run_folder):
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config | {"hellaswag_file": None}))
    scores = {
        "hellaswag/acc_norm": 0.3,
        "hellaswag/acc": 0.28,
        "hellaswag/acc_norm_stderr": 0.0046,
        "hellaswag/n": 10042,
    }
    with open(run_folder / "metrics.jsonl", "a") as stream:
        stream.write("\n" + json.dumps({"step": 4, **scores}) + "\n")
    text = render_card(run_folder / "final", run_folder)
    assert read_index(text) == {("original", "acc_norm"): 0.3, ("original", "acc"): 0.28}


def test_a_hub_dataset_is_cited_with_its_commit(run_folder, data_folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    manifest = json.loads((data_folder / "manifest.json").read_text())
    manifest["source"] = {"id": "HuggingFaceFW/fineweb-edu", "config": "sample-10BT", "split": "train"}
    manifest["source"]["revision"] = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
    manifest["settings"] |= {"dataset_name": "HuggingFaceFW/fineweb-edu", "files": None}
    (data / "manifest.json").write_text(json.dumps(manifest))
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config | {"data_dir": str(data)}))
    text = render_card(run_folder / "final", run_folder)
    assert ModelCard(text).data.datasets == ["HuggingFaceFW/fineweb-edu"]
    result = yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"][0]
    assert result["dataset"]["type"] == "HuggingFaceFW/fineweb-edu"
    assert result["dataset"]["revision"] == manifest["source"]["revision"]
    assert f"--revision={manifest['source']['revision']}" in text.split("```bash")[1]


@pytest.mark.parametrize(
    ("name", "row", "flag"),
    [
        ("openai-community/gpt2", "`openai-community/gpt2`, 50,257 ids", "openai-community/gpt2"),
        ("./toks/mine", "saved with the model, from `./toks/mine`, 50,257 ids", "./toks/mine"),
        ("/home/me/toks/mine", "saved with the model, from `PATH/TO/mine`, 50,257 ids", "PATH/TO/mine"),
    ],
)
def test_a_local_tokenizer_is_not_mistaken_for_one_on_the_hub(run_folder, data_folder, tmp_path, name, row, flag):
    data = tmp_path / "data"
    data.mkdir()
    manifest = json.loads((data_folder / "manifest.json").read_text()) | {"tokenizer": name}
    (data / "manifest.json").write_text(json.dumps(manifest))
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config | {"data_dir": str(data)}))
    text = render_card(run_folder / "final", run_folder)
    assert read_table(text)["tokenizer"] == row
    assert f"--tokenizer={flag} " in text.split("```bash")[1]


@pytest.mark.parametrize("init_from, base", [("gpt2", "gpt2"), ("/home/me/x", None), ("scratch", None), (".", None)])
def test_the_base_model_is_cited_only_if_it_is_on_the_hub(run_folder, init_from, base):
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config | {"init_from": init_from}))
    text = render_card(run_folder / "final", run_folder)
    assert ModelCard(text).data.base_model == base
    assert "/home" not in text


def test_a_checkpoints_card_contains_nothing_later(run_folder):
    write_scores(run_folder)
    text = render_card(run_folder / "final", run_folder, step=2)
    assert "checkpoint after 2 updates" in text and "early words" in text
    assert "7.2500 nats" in text and "5.2500" not in text and "last " not in text.split("## Samples")[1].split("##")[0]
    assert "in training | 0.2604 (chance 0.25) |" in text and "lm_eval" not in text  # scores of the finished model


@pytest.mark.parametrize("step", [3, None])
def test_metrics_of_an_earlier_model_are_labeled(run_folder, step):
    """Neither a checkpoint between two evaluations nor a run resumed without any has a loss of its own."""
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config | {"hellaswag_file": None}))
    lines = [
        {"step": 2, "val/loss": 7.25, "val/bpb": 3.5, "hellaswag/acc_norm": 0.3, "hellaswag/acc": 0.28},
        {"step": 3, "train/loss": 6.0, "train/tokens": 1572864},
    ]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = describe_model(run_folder / "final", RunFolder(run_folder), step=step)
    assert [*texts] == [CARD] and "model-index" not in texts[CARD] and "acc_norm" not in texts[CARD]
    table = read_table(texts[CARD])
    assert (
        table["validation loss of an earlier model, at step 2"].startswith("7.2500") and "validation loss" not in table
    )
    assert table["updates"] == "3, each of 524,288 tokens"


def test_scores_of_other_or_older_models_are_ignored(run_folder, capsys):
    write_scores(run_folder, "hellaswag_gpt2.json", model="openai-community/gpt2")
    (run_folder / "hellaswag_damaged.json").write_text('{"model": "run/final", "original"')
    write_scores(run_folder, "hellaswag_odd.json", original={"acc": "x"}, lm_eval=None)
    write_scores(run_folder, "hellaswag_old.json")
    os.utime(run_folder / "hellaswag_old.json", (0, 0))
    capsys.readouterr()
    assert "lm_eval" not in render_card(run_folder / "final", run_folder)
    lines = capsys.readouterr().err.splitlines()
    for name, reason in {
        "damaged": "it is damaged or contains no scores",
        "gpt2": "it was measured with the model openai-community/gpt2",
        "odd": "it is damaged or contains no scores",
        "old": f"it is older than {run_folder / 'final'}",
    }.items():
        assert lines.pop(0) == f"skipping {run_folder / f'hellaswag_{name}.json'}: {reason}"
    assert not lines


def test_scores_are_matched_by_weights_wherever_the_run_is(run_folder, tmp_path, capsys):
    """Neither the model's name nor the files' modification times matter."""
    (run_folder / "final" / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    weights = identify_weights(run_folder / "final")
    write_scores(run_folder, weights=weights)
    copy = tmp_path / "renamed"
    shutil.copytree(run_folder, copy)
    os.utime(copy / "hellaswag.json", (0, 0))
    assert "protocol `lm_eval` | 0.5000" in render_card(copy / "final", copy)
    assert not capsys.readouterr().err
    write_scores(copy, weights=weights[::-1])
    assert "lm_eval" not in render_card(copy / "final", copy)
    assert "hellaswag.json: it was measured with other (or earlier) weights" in capsys.readouterr().err


def test_scores_in_float32_are_preferred(run_folder):
    scores = {"acc": 0.25, "acc_norm": 0.5, "n": 10042}
    write_scores(run_folder, "hellaswag_a.json", dtype="float32", is_validation_split=True, lm_eval=scores)
    scores = {"acc": 0.26, "acc_norm": 0.51, "n": 10042}
    write_scores(run_folder, "hellaswag_b.json", dtype="bfloat16", is_validation_split=True, lm_eval=scores)
    texts = describe_model(run_folder / "final", RunFolder(run_folder))
    assert "0.5100 (chance 0.25, 10,042 items), in bfloat16" in texts[CARD]
    assert "0.5000 (chance 0.25, 10,042 items), in float32" in texts[CARD]
    (result,) = (
        result
        for result in ModelCard(texts[CARD]).data.eval_results
        if result.metric_type == "acc_norm" and result.metric_args["protocol"] == "lm_eval"
    )
    assert (result.metric_value, result.metric_args["dtype"]) == (0.5, "float32")
    (entry,) = yaml.safe_load(texts[".eval_results/hellaswag_lm_eval.yaml"])
    assert entry["value"] == 0.5 and entry["notes"].endswith(", in float32")


def test_samples_are_escaped(run_folder):
    text = render_card(run_folder / "final", run_folder)
    assert r"> last &lt;b&gt;words&lt;/b&gt; \| \`x\` \[y\](z)" in text
    assert quote_text("a\n# b\n---") == r"a \# b ---"


def test_a_card_is_written_without_records_and_data(run_folder, data_folder, tmp_path):
    for name in ("metrics.jsonl", "samples.jsonl", "curves.png"):
        (run_folder / name).unlink()
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config | {"data_dir": str(tmp_path / "gone")}))
    text = render_card(run_folder / "final", run_folder)
    for words in ("Nothing was measured.", "No samples", "`gone`, a folder without a manifest", "not recorded"):
        assert words in text
    assert "curves.png" not in text
    ModelCard(text)


def test_a_card_that_cannot_be_rebuilt_is_kept_and_reported(run_folder, tmp_path, capsys):
    config = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 64}
    (run_folder / "final" / "config.json").write_text(json.dumps(config))
    (run_folder / "final" / CARD).write_text("as it was")
    files = collect_model(run_folder / "final", RunFolder(run_folder), "me/run")
    assert b"me/run" in files[CARD] and not capsys.readouterr().err
    settings = yaml.safe_load((run_folder / "config.yaml").read_text())
    (run_folder / "config.yaml").write_text(yaml.safe_dump(settings | {"data_dir": str(tmp_path / "gone")}))
    files = collect_model(run_folder / "final", RunFolder(run_folder), "me/run")
    assert files[CARD].read_text() == "as it was"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("keeping the existing model card") and str(tmp_path / "gone") in line
