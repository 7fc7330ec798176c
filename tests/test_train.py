"""The training script from end to end, on shards small enough for a test."""

import json
import math
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import real_pictures
from safetensors.torch import load_file
from small_runs import N_STEPS, SMALL, flags, launch, read_losses, read_series, run_training
from tiny_tokenizers import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import eval_hellaswag
import modeling_gpt2_repro
import prepare_data
import train
from modeling_gpt2_repro.data.dataset import TokenDataset
from modeling_gpt2_repro.plots.panels import SMALL_PANELS
from modeling_gpt2_repro.training import checkpoint as checkpoint_module
from modeling_gpt2_repro.training import device_fit, metrics
from modeling_gpt2_repro.training.batch_fit import WindowLoss
from modeling_gpt2_repro.training.building import build_model
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.metrics import read_metrics

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def finished_run(shards, tmp_path_factory) -> Path:
    with real_pictures():
        return run_training(shards, tmp_path_factory.mktemp("runs"))


def test_train_and_validation_loss_fall(finished_run):
    losses, val_losses = read_losses(finished_run), read_series(finished_run, "val/loss")
    assert list(losses) == list(range(1, N_STEPS + 1))
    assert losses[1] == pytest.approx(math.log(1000), abs=0.1)
    assert losses[N_STEPS] < losses[1] - 2
    assert list(val_losses) == [0, 6, 12]
    assert val_losses[12] == pytest.approx(losses[12], abs=0.5)


def test_the_run_folder_is_complete(finished_run, shards):
    names = {path.name for path in finished_run.iterdir()}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "log.txt",
        "samples.jsonl",
        "status.json",
        "curves.png",
        "checkpoints",
        "final",
    }
    assert {path.name for path in (finished_run / "checkpoints").iterdir()} == {"step_0000006", "step_0000012"}
    status = json.loads((finished_run / "status.json").read_text())
    assert (status["status"], status["step"]) == ("finished", N_STEPS) and "torch" in status["versions"]
    assert list(read_series(finished_run, "train/checkpoint_seconds")) == [6, 12]
    assert read_series(finished_run, "train/tokens")[N_STEPS] == N_STEPS * 256
    assert read_series(finished_run, "train/epoch")[N_STEPS] == pytest.approx(
        N_STEPS * 8 / ((count_tokens(shards, "train") - 1) // 32)
    )
    samples = [json.loads(line) for line in (finished_run / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0] * 4 + [6] * 4 + [12] * 4
    assert all(sample["text"].startswith("Hello, I'm a language model,") for sample in samples)


def test_the_names_of_all_metrics_are_documented(finished_run):
    names = {name for line in read_metrics(finished_run / "metrics.jsonl") for name in line} - {"step"}
    documented = set(re.findall(r"`([a-z_]+/[a-z0-9_]+)`", metrics.__doc__))
    assert names == documented | {name.replace("hellaswag/", "hellaswag_lm_eval/") for name in documented}
    assert SMALL_PANELS.keys() <= documented


def test_the_log_keeps_the_original_scripts_numbering(finished_run):
    lines = (finished_run / "log.txt").read_text().splitlines()
    losses, val_losses = read_losses(finished_run), read_series(finished_run, "val/loss")
    assert lines[0] == f"0 val {val_losses[0]:.4f}"
    assert lines[2] == f"0 train {losses[1]:.6f}"
    assert f"6 val {val_losses[6]:.4f}" in lines


def test_the_final_model_is_the_last_checkpoint_and_opens_as_stock_gpt2(finished_run, tokenizer):
    final = AutoModelForCausalLM.from_pretrained(finished_run / "final")
    checkpoint = AutoModelForCausalLM.from_pretrained(finished_run / "checkpoints" / "step_0000012")
    assert type(final) is GPT2LMHeadModel
    dropouts = (final.config.resid_pdrop, final.config.embd_pdrop, final.config.attn_pdrop)
    assert dropouts == (0.0, 0.0, 0.0)  # stock GPT-2's default is 0.1
    assert type(checkpoint) is modeling_gpt2_repro.GPT2ReproForCausalLM
    ids = AutoTokenizer.from_pretrained(finished_run / "final")("The old lighthouse", return_tensors="pt").input_ids
    torch.testing.assert_close(final(ids).logits, checkpoint.eval()(ids).logits, atol=1e-5, rtol=0)
    assert "validation loss" in (finished_run / "final" / "README.md").read_text()


def test_evaluating_and_sampling_do_not_change_training(shards, tmp_path, finished_run):
    quiet = run_training(shards, tmp_path, eval_every=0, hellaswag_every=0, sample_every=0, save_every=0)
    assert read_losses(quiet) == read_losses(finished_run)
    assert not (quiet / "checkpoints").exists()


def test_the_micro_batch_size_does_not_change_the_experiment(shards, tmp_path, finished_run):
    divided = run_training(shards, tmp_path, micro_batch_size=2)
    for name in ("train/loss", "val/loss"):
        ours, expected = read_series(divided, name), read_series(finished_run, name)
        assert list(ours) == list(expected)
        assert np.allclose(list(ours.values()), list(expected.values()), atol=1e-4)


def test_a_resumed_run_ends_with_the_same_weights(shards, tmp_path, finished_run, capsys):
    run = run_training(shards, tmp_path)
    for path in ("final/model.safetensors", "checkpoints/step_0000012/training_state/state.json"):
        (run / path).unlink()
    (run / "checkpoints" / "step_0000012").rename(tmp_path / "elsewhere")

    run_training(shards, tmp_path)
    assert "from step 6" in capsys.readouterr().out
    assert read_losses(run) == read_losses(finished_run)
    assert read_series(run, "val/loss") == read_series(finished_run, "val/loss")
    assert (run / "log.txt").read_text() == (finished_run / "log.txt").read_text()
    assert (run / "samples.jsonl").read_text() == (finished_run / "samples.jsonl").read_text()
    ours, expected = (load_file(folder / "final" / "model.safetensors") for folder in (run, finished_run))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_dropout_is_off_by_default_and_resumes_with_the_same_masks(shards, tmp_path, finished_run, capsys):
    quick = {"eval_every": 0, "hellaswag_every": 0, "sample_every": 0, "dropout": 0.1}
    whole = run_training(shards, tmp_path, "whole", **quick)
    assert "dropout 0.1" in capsys.readouterr().out
    assert read_losses(whole)[1] != read_losses(finished_run)[1]
    assert json.loads((whole / "final" / "config.json").read_text())["resid_pdrop"] == 0.0

    killed = tmp_path / "killed" / "checkpoints"
    killed.mkdir(parents=True)
    (whole / "checkpoints" / "step_0000006").rename(killed / "step_0000006")
    resumed = run_training(shards, tmp_path, "killed", **quick)
    assert list(read_losses(resumed).items()) == list(read_losses(whole).items())[6:]


def test_a_finished_run_is_replaced_only_on_request(shards, tmp_path, capsys):
    run = run_training(shards, tmp_path, save_every=100)
    before = (run / "metrics.jsonl").read_text()
    assert train.main(flags(shards, tmp_path, save_every=100)) == 0
    assert "is finished" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_text() == before

    assert train.main(flags(shards, tmp_path, save_every=100, learning_rate=1e-3)) == 2
    assert "learning_rate was 0.02 and is now 0.001" in capsys.readouterr().err
    run_training(shards, tmp_path, save_every=100, learning_rate=1e-3, resume_from_checkpoint="never")
    assert list(read_losses(run)) == list(range(1, N_STEPS + 1))
    assert (run / "metrics.jsonl").read_text() != before


def test_a_run_killed_before_its_final_model_writes_it_and_one_without_checkpoints_is_not_replaced(
    shards, tmp_path, finished_run, capsys
):
    run = run_training(shards, tmp_path, hellaswag_every=0, sample_every=0)
    shutil.rmtree(run / "final")
    run_training(shards, tmp_path, hellaswag_every=0, sample_every=0)
    ours, expected = (load_file(folder / "final" / "model.safetensors") for folder in (run, finished_run))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)

    shutil.rmtree(run / "checkpoints")
    assert train.main(flags(shards, tmp_path)) == 2
    assert "contains a finished run" in capsys.readouterr().err
    assert (run / "final").is_dir()


def test_saved_settings_repeat_the_experiment(shards, tmp_path, finished_run):
    config = f"--config={finished_run / 'config.yaml'}"
    assert train.main([config, f"--output_dir={tmp_path}", "--run_name=again"]) == 0
    assert read_losses(tmp_path / "again") == read_losses(finished_run)


def test_training_can_start_from_an_existing_model(shards, tmp_path, finished_run):
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16}
    run = run_training(shards, tmp_path, init_from=finished_run / "final", learning_rate=1e-6, **shape)
    assert read_series(run, "val/loss")[0] == pytest.approx(read_series(finished_run, "val/loss")[12], abs=1e-5)


def test_incomplete_models_and_other_shapes_are_rejected(shards, tmp_path, finished_run, capsys):
    shape = {"n_layer": None, "n_head": None, "n_embd": None}

    def complain(source: Path, **changes) -> str:
        argv = [flag for flag in flags(shards, tmp_path, init_from=source, **changes) if not flag.endswith("=None")]
        assert train.main(argv) == 2
        return capsys.readouterr().err

    assert "has n_layer 2, but" in complain(finished_run / "final", **shape, model_size="124M")
    longer = complain(finished_run / "final", **shape, sequence_length=64, tokens_per_step=512)
    assert "--sequence_length 64 is longer than the 32 positions" in longer
    few_ids = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=100, n_positions=32))
    few_ids.save_pretrained(tmp_path / "few_ids")
    assert "has vocab_size 100, but the data's tokenizer requires 1000" in complain(tmp_path / "few_ids", **shape)
    broken = tmp_path / "broken"
    shutil.copytree(finished_run / "final", broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    assert "are missing or have another shape" in complain(broken, **shape)
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert "is a llama model" in complain(broken, **shape)
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    assert "cannot load a model from" in complain(broken, **shape)


def test_going_back_to_an_older_checkpoint_deletes_the_newer_ones(shards, tmp_path, finished_run):
    run = run_training(shards, tmp_path, save_every=4)
    older = run / "checkpoints" / "step_0000004"
    newest = run / "checkpoints" / "step_0000012"
    (newest / "mark-of-the-old-time-line").touch()
    run_training(shards, tmp_path, save_every=0, resume_from_checkpoint=older)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_0000004"]
    assert read_losses(run) == read_losses(finished_run)


def test_two_processes_run_the_experiment_of_one(shards, tmp_path):
    # The learning rate is so small that rounding differences stay small over 30 updates.
    settings = {"max_steps": 30, "learning_rate": 3e-3, "eval_every": 15, "hellaswag_every": 30, "save_every": 0}
    alone = run_training(shards, tmp_path, "alone", **settings)
    result = launch(2, flags(shards, tmp_path, "together", micro_batch_size=2, **settings))
    assert result.returncode == 0, result.stderr
    assert "2 process(es) x 2 micro-step(s) x 2 sequence(s)" in result.stdout
    for name in ("train/loss", "train/grad_norm", "val/loss", "hellaswag/acc_norm"):
        ours, expected = read_series(tmp_path / "together", name), read_series(alone, name)
        assert list(ours) == list(expected)
        assert np.allclose(list(ours.values()), list(expected.values()), atol=1e-4), name
    assert len(read_losses(alone)) == 30
    ours, expected = (load_file(folder / "final" / "model.safetensors") for folder in (tmp_path / "together", alone))
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], atol=1e-4, rtol=0, msg=name)
    together = (tmp_path / "together" / "samples.jsonl").read_text()
    assert together == (alone / "samples.jsonl").read_text()


def test_losses_match_a_plain_loop_over_stock_gpt2(gpt2_shards, tmp_path, tokenizer):
    """The same windows, accumulation, clipping, schedule and optimizer, on transformers' own model."""
    n_steps, settings = 20, {"learning_rate": 1e-3, "eval_every": 0, "hellaswag_every": 0, "sample_every": 0}
    run = run_training(
        gpt2_shards, tmp_path, max_steps=n_steps, micro_batch_size=2, grad_clip=0.5, shuffle_windows="off", **settings
    )

    shape = TrainingConfig(n_layer=2, n_head=2, n_embd=16, sequence_length=32)
    build_model("scratch", shape, tokenizer).save_pretrained(tmp_path / "start")
    stock = GPT2LMHeadModel.from_pretrained(
        tmp_path / "start", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, ignore_mismatched_sizes=False
    ).train()
    decayed = [parameter for parameter in stock.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in stock.parameters() if parameter.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    tokens = torch.from_numpy(
        np.concatenate([np.load(path) for path in sorted(gpt2_shards.glob("*_train_*.npy"))]).astype(int)
    )
    losses, norms = {}, {}
    for step in range(n_steps):
        # Two steps of warm-up (512 tokens, 256 per step), then half a cosine down to a tenth.
        progress = (step - 2) / (n_steps - 2)
        decay = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        learning_rate = 1e-3 * ((step + 1) / 2 if step < 2 else decay)
        windows = torch.stack([tokens[32 * i : 32 * i + 33] for i in range(8 * step, 8 * step + 8)])
        logits = stock(windows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norms[step + 1] = torch.nn.utils.clip_grad_norm_(stock.parameters(), 0.5).item()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        losses[step + 1] = loss.item()
    assert max(norms.values()) > 0.5  # otherwise clipping would not be tested
    assert read_losses(run) == pytest.approx(losses, abs=1e-5)
    assert read_series(run, "train/grad_norm") == pytest.approx(norms, rel=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_run_trains_evaluates_and_samples_like_an_eager_one(shards, tmp_path, finished_run, capsys):
    torch._dynamo.reset()
    run = run_training(shards, tmp_path, compile="on")
    assert "torch.compile failed" not in capsys.readouterr().out
    # The training step is the only graph: evaluation and sampling are not compiled.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for name in ("train/loss", "val/loss"):
        ours, expected = read_series(run, name), read_series(finished_run, name)
        assert list(ours) == list(expected)
        assert np.allclose(list(ours.values()), list(expected.values()), atol=1e-3), name
    assert all("_orig_mod" not in name for name in load_file(run / "checkpoints/step_0000012/model.safetensors"))


def test_the_speed_counts_only_training(shards, tmp_path, monkeypatch):
    seconds, save = 0.5, train.save
    monkeypatch.setattr(train, "evaluate", lambda run, step: time.sleep(seconds))
    monkeypatch.setattr(train, "save", lambda *arguments, **more: (time.sleep(seconds), save(*arguments, **more))[1])
    run = run_training(shards, tmp_path)
    rates, waits, shares = (
        read_series(run, f"train/{name}") for name in ("tokens_per_second", "data_wait_seconds", "mfu")
    )
    elapsed = read_series(run, "train/elapsed_seconds")
    assert list(rates) == list(waits) == list(shares) == list(range(1, N_STEPS + 1))
    training = sum(256 / rate for rate in rates.values())
    # Between the first and the last update, at step 6, there are an evaluation and a checkpoint.
    assert elapsed[N_STEPS] - elapsed[1] > training - 256 / rates[1] + 2 * seconds
    assert all(0 <= waits[step] <= 256 / rates[step] for step in rates)
    assert all(0 < share < 1 for share in shares.values())


@pytest.fixture
def random_shards(shards, tmp_path) -> Path:
    """Shards of random ids in which every window begins with another id."""
    folder = tmp_path / "random"
    shutil.copytree(shards, folder)
    paths = sorted(folder.glob("*_train_*.npy"))
    sizes = [len(np.load(path)) for path in paths]
    chance = np.random.default_rng(0)
    ids = chance.integers(0, 1000, sum(sizes), dtype=np.uint16)
    ids[::32] = chance.permutation(1000)[: len(ids[::32])]
    for path, part in zip(paths, np.split(ids, np.cumsum(sizes)[:-1]), strict=True):
        np.save(path, part)
    return folder


def poison(monkeypatch, shards: Path, update: int, fault) -> None:
    """Replace the loss of the windows of one update with `fault(loss)`."""
    forward, dataset = WindowLoss.forward, TokenDataset(str(shards), "train", 32, 1000)
    bad = set(dataset.read(range(8 * (update - 1), 8 * update))[:, 0].tolist())

    def poisoned(self, windows: torch.Tensor) -> torch.Tensor:
        loss = forward(self, windows)
        return fault(loss) if bad & set(windows[:, 0].tolist()) else loss

    monkeypatch.setattr(WindowLoss, "forward", poisoned)


def test_data_that_break_the_run_are_reported_and_can_be_skipped(random_shards, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, random_shards, update=7, fault=lambda loss: loss * math.nan)
    quick = {"eval_every": 0, "hellaswag_every": 0, "sample_every": 0, "save_every": 3, "shuffle_windows": "off"}
    assert train.main(flags(random_shards, tmp_path, **quick)) == 2
    error = capsys.readouterr().err
    assert "update 7 has a loss of nan" in error and "--skip_steps 7:7" in error
    run = tmp_path / "run"
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["update"], status["windows"]) == ("failed", 7, list(range(48, 56)))
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_0000003", "step_0000006"]
    before = load_file(run / "checkpoints" / "step_0000006" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in before.values())

    run_training(random_shards, tmp_path, **quick, skip_steps="7:7")
    assert "- '7:7'" in (run / "config.yaml").read_text()
    assert "skipped     updates 7 to 7" in capsys.readouterr().out
    assert list(read_losses(run)) == [step for step in range(1, N_STEPS + 1) if step != 7]
    whole = read_losses(run)
    # Skips are stored: resuming from a later checkpoint needs no flag and ends the same.
    shutil.rmtree(run / "checkpoints" / "step_0000012")
    run_training(random_shards, tmp_path, **quick)
    assert "- '7:7'" in (run / "config.yaml").read_text()
    assert "skipped     updates 7 to 7" in capsys.readouterr().out
    assert read_losses(run) == whole
    assert (
        train.main(flags(random_shards, tmp_path, **quick, skip_steps="5:5", resume=run / "checkpoints/step_0000009"))
        == 2
    )
    assert "already includes updates up to 9" in capsys.readouterr().err


def test_overflows_are_skipped_until_there_are_too_many(random_shards, tmp_path, monkeypatch, capsys):
    """With the loss scaler of fp16, which accelerate enables only on GPUs."""
    start = train.start_accelerator

    def start_with_scaler(precision: str, **settings):
        accelerator = start(precision, **settings)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator

    def overflow(loss: torch.Tensor) -> torch.Tensor:
        return loss + torch.sqrt(loss - loss.detach())  # plus 0, with an infinite slope

    monkeypatch.setattr(train, "start_accelerator", start_with_scaler)
    quick = {"eval_every": 0, "hellaswag_every": 0, "sample_every": 0, "save_every": 0, "shuffle_windows": "off"}
    with monkeypatch.context() as patch:
        poison(patch, random_shards, update=7, fault=overflow)
        norms = read_series(run_training(random_shards, tmp_path, **quick), "train/grad_norm")
    assert list(norms) == [step for step in range(1, N_STEPS + 1) if step != 7]
    forward = WindowLoss.forward
    monkeypatch.setattr(WindowLoss, "forward", lambda self, windows: overflow(forward(self, windows)))
    assert train.main(flags(random_shards, tmp_path, "lost", **quick, max_steps=30)) == 2
    assert "the last 20 updates, up to 20, were skipped" in capsys.readouterr().err


def test_running_out_of_memory_later_gives_one_line(random_shards, tmp_path, monkeypatch, capsys):
    def run_out(loss):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    poison(monkeypatch, random_shards, update=7, fault=run_out)
    assert train.main(flags(random_shards, tmp_path, shuffle_windows="off")) == 2
    assert "resume with --micro_batch_size 4 or" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "step_0000006").is_dir()


def test_a_smoke_test_measures_saves_loads_and_leaves_nothing(shards, tmp_path, capsys, monkeypatch):
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda run, step: (time.sleep(2), evaluate(run, step)))
    theirs = tmp_path / "run-smoke" / "final"
    theirs.mkdir(parents=True)
    assert train.main([*flags(tmp_path / "no_data", tmp_path), "--smoke"]) == 2
    capsys.readouterr()
    assert train.main([*flags(shards, tmp_path, max_steps=100, save_every=0, keep_weights_every=3), "--smoke"]) == 0
    out = capsys.readouterr().out
    assert "median of 8" in out and "MFU" in out and "GB peak" in out
    assert float(re.search(r"overhead +([\d.]+) s per evaluation", out)[1]) >= 2
    assert "reloaded bit for bit" in out and "for 100 steps, evaluations included" in out
    assert "step 10: val/loss" in out and "step 10 sample" in out and "step 0:" not in out
    assert list(tmp_path.rglob("*")) == [tmp_path / "run-smoke", theirs]


def test_plan_prints_the_arithmetic_and_writes_nothing(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "start_accelerator", None)
    assert train.main([*flags(shards, tmp_path), "--plan"]) == 0
    out = capsys.readouterr().out
    assert "parameters" in out and "12 steps = " in out and "3 x 512 validation tokens" in out
    assert list(tmp_path.iterdir()) == []
    # Without data, the number of steps must be given.
    assert train.main([f"--data_dir={tmp_path / 'none'}", "--plan", "--max_steps=19073"]) == 0
    assert "124,439,808 parameters" in capsys.readouterr().out
    assert train.main([f"--data_dir={tmp_path / 'none'}", "--plan"]) == 2
    assert "create it with prepare_data.py" in capsys.readouterr().err


def test_a_cpu_run_of_more_than_a_week_needs_confirmation(shards, tmp_path, capsys):
    endless = {"max_steps": 10**9, "eval_every": 0, "hellaswag_every": 0, "sample_every": 0, "save_every": 0}
    assert train.main(flags(shards, tmp_path, **endless)) == 2
    assert "--yes" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def count_tokens(folder: Path, split: str) -> int:
    return sum(len(np.load(path, mmap_mode="r")) for path in folder.glob(f"*_{split}_*.npy"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data_dir": "nowhere"}, "there is no data folder nowhere"),
        ({"tokens_per_step": 300}, "not a multiple of --sequence_length 32: use 288"),
        ({"micro_batch_size": 3}, "--micro_batch_size 3 does not divide the 8 sequences"),
        ({"max_steps": 0}, "--max_steps must be 1 or more"),
        ({"model_size": "125M", "n_layer": 1}, "use one of 124M"),
        ({"n_head": 3}, "--n_embd 16 must be divisible by --n_head 3"),
        ({"init_from": "no/such-model"}, "cannot load a model from no/such-model"),
        ({"sample_tokens": 4}, "the prompt alone has 8 tokens"),
        ({"sample_prompt": ""}, "the prompt has no tokens"),
        ({"seed": 2**64}, "--seed must be below 9,223,372,036,854,775,808"),
        ({"hellaswag_file": "missing.jsonl"}, "missing.jsonl"),
        ({"sequence_length": 8, "sample_every": 0}, "tokens does not fit the model's 8 positions"),
        ({"resume_from_checkpoint": "missing"}, "missing is not a checkpoint to resume from"),
        ({"block_size": 64}, "unknown setting --block_size: use --sequence_length"),
        ({"lerning_rate": 1}, "did you mean --learning_rate?"),
        ({"compile": "maybe"}, "--compile"),
        ({"keep_weights_every": 5}, "--keep_weights_every 5 is not a multiple of --save_every 6, and only"),
        ({"keep_weights_every": 15}, "can be kept: use 18, or another --save_every"),
        ({"skip_steps": "7"}, "--skip_steps 7: must be A:B"),
        ({"plan_tokens_per_second": 0}, "--plan_tokens_per_second must be"),
    ],
)
def test_mistakes_give_one_line_and_leave_nothing(changes, message, shards, tmp_path, capsys):
    changes = {"data_dir": shards, **changes}
    data_dir = changes.pop("data_dir")
    assert train.main(flags(data_dir, tmp_path, **changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_shorter_than_a_batch_is_rejected(shards, tmp_path, capsys):
    short = tmp_path / "short"
    short.mkdir()
    tokens = np.load(shards / "story_val_000000.npy")
    np.save(short / "s_val_000000.npy", tokens[:200])
    np.save(short / "s_train_000001.npy", tokens[:200])
    argv = [flag for flag in flags(short, tmp_path) if not flag.startswith("--max_steps")]
    assert train.main(argv) == 2
    assert "do not fill one step of 8" in capsys.readouterr().err
    np.save(short / "s_train_000001.npy", tokens[:20])
    assert train.main(argv) == 2
    assert "fewer than one window of 33" in capsys.readouterr().err


def test_the_tokenizer_adds_no_special_tokens_anywhere(tmp_path):
    """In a run and in its models: by itself, the tokenizer of the data adds tokens at both ends, and token types."""
    FAMILIES["bert"]().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text(";".join(f"{i} lighthouses, one keeper, the lazy dog" for i in range(150)))
    argv = [f"--files={tmp_path / 'text.txt'}", "--document_separator=;", f"--tokenizer={tmp_path / 'tokenizer'}"]
    assert prepare_data.main([*argv, f"--output_dir={tmp_path / 'data'}", "--val_tokens=600", "--num_workers=1"]) == 0
    changes = {"max_steps": 2, "eval_every": 2, "hellaswag_every": 2, "hellaswag_limit": 2, "sample_every": 0}
    changes |= {"save_every": 1, "save_best": True, "sequence_length": 128, "tokens_per_step": 512}
    run = run_training(tmp_path / "data", tmp_path, **changes)
    for folder in (run / "final", run / "best", run / "checkpoints" / "step_0000002"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer("")["input_ids"] == []
        assert {*tokenizer("the dog")} == {"input_ids", "attention_mask"}
    scores = tmp_path / "scores.json"
    items = ["--data_file", SMALL["hellaswag_file"], "--limit", "2", "--output", str(scores)]
    assert eval_hellaswag.main(["--model", str(run / "final"), *map(str, items)]) == 0
    for protocol, prefix in (("original", "hellaswag"), ("lm_eval", "hellaswag_lm_eval")):
        assert json.loads(scores.read_text())[protocol]["acc_norm"] == read_series(run, f"{prefix}/acc_norm")[2]


def test_data_of_another_tokenizer_are_rejected(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("One lighthouse, one keeper, many ships. " * 200)
    data = tmp_path / "data"
    assert prepare_data.main([f"--files={tmp_path / 'text.txt'}", f"--output_dir={data}", "--val_tokens=200"]) == 0
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["tokenizer_fingerprint"] = "sha256:0"
    (data / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert train.main(flags(data, tmp_path)) == 2
    assert "is not the one that" in capsys.readouterr().err
    for shard in data.glob("*_train_*.npy"):
        shard.unlink()
    assert train.main(flags(data, tmp_path)) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_stops_before_it_saves(shards, tmp_path, capsys):
    assert train.main(flags(shards, tmp_path, learning_rate=1e30, save_every=1, grad_clip=1e30)) == 2
    assert "a loss of nan" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"


def test_a_resumed_run_keeps_its_micro_batch_on_the_same_hardware(shards, tmp_path, monkeypatch, capsys):
    train_folder = run_training(shards, tmp_path, max_steps=6, lr_schedule="constant", micro_batch_size=4)
    checkpoint = train_folder / "checkpoints" / "step_0000006"
    state = json.loads((checkpoint / "training_state" / "state.json").read_text())
    assert (state["micro_batch_size"], state["hardware"]) == (4, "1 x cpu")
    capsys.readouterr()

    again = {"max_steps": 8, "lr_schedule": "constant", "micro_batch_size": "auto"}
    shutil.copytree(train_folder, tmp_path / "elsewhere")
    shutil.rmtree(train_folder / "final")
    run_training(shards, tmp_path, **again)
    assert "2 micro-step(s) x 4 sequence(s)" in capsys.readouterr().out

    shutil.rmtree(tmp_path / "elsewhere" / "final")
    monkeypatch.setattr(device_fit, "name_hardware", lambda accelerator: "another device")
    run_training(shards, tmp_path, "elsewhere", **again)
    assert "1 micro-step(s) x 8 sequence(s)" in capsys.readouterr().out


def test_the_trial_runs_before_the_optimizer_state_is_loaded(shards, tmp_path, monkeypatch):
    folder = run_training(shards, tmp_path, max_steps=6, lr_schedule="constant")
    shutil.rmtree(folder / "final")
    order, fit, load = [], device_fit.fit_micro_batch, checkpoint_module.load_optimizer_state
    monkeypatch.setattr(device_fit, "fit_micro_batch", lambda *args: order.append("trial") or fit(*args))
    monkeypatch.setattr(
        checkpoint_module, "load_optimizer_state", lambda *args: order.append("moments") or load(*args)
    )
    run_training(shards, tmp_path, max_steps=7, lr_schedule="constant")
    assert order == ["trial", "moments"]


def test_an_operation_without_a_deterministic_implementation_gives_one_line(shards, tmp_path, monkeypatch, capsys):
    class Unordered(WindowLoss):
        """A loss with an operation that has no deterministic implementation."""

        def forward(self, windows: torch.Tensor) -> torch.Tensor:
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
            return super().forward(windows)

    monkeypatch.setattr(device_fit, "WindowLoss", Unordered)
    assert train.main(flags(shards, tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "put_ has no deterministic implementation" in line
