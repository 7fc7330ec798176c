"""What loads as a causal language model, and what is rejected with its class name."""

import json

import pytest
import torch
import transformers
from tiny_architectures import build_config

import eval_hellaswag
import train
from modeling_gpt2_repro.__main__ import main as run_command
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE
from modeling_gpt2_repro.model import loading


@pytest.fixture(scope="module")
def save(tmp_path_factory, tokenizer):
    """Return a function that saves one of transformers' models with a tokenizer and returns the folder."""

    def save(class_name, **changes):
        kind = getattr(transformers, class_name)
        config = build_config(kind.config_class.model_type, vocab_size=len(tokenizer), **changes)
        folder = tmp_path_factory.mktemp("model")
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def test_every_command_rejects_models_that_look_ahead(save, shards, tmp_path, capsys):
    folder = save("BertForMaskedLM", max_position_embeddings=128)
    eval_only = [f"--init_from={folder}", f"--data_dir={shards}", "--sequence_length=32", "--hellaswag_every=0"]
    eval_only += ["--eval_only", f"--output_dir={tmp_path}", "--mixed_precision=no", "--report_to=none"]
    for main, argv in (
        (eval_hellaswag.main, [f"--model={folder}", f"--data_file={SAMPLE_FILE}", "--limit=1"]),
        (train.main, eval_only),
        (run_command, ["sample", f"--model={folder}"]),
    ):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert "BertLMHeadModel" in err and "is not causal" in err and "acc" not in out
    decoder = save("BertLMHeadModel", is_decoder=True, max_position_embeddings=128)
    assert run_command(["sample", f"--model={decoder}", "--n_tokens=12", "--n_samples=1"]) == 0


@pytest.mark.parametrize(
    "class_name",
    [
        "GPT2ForSequenceClassification",
        "GPT2ForTokenClassification",
        "GPT2ForQuestionAnswering",
        "LlamaForSequenceClassification",
        "Gemma2ForSequenceClassification",
        "BertForSequenceClassification",
        "BertForMultipleChoice",
        "BertForNextSentencePrediction",
        "DistilBertForMaskedLM",
        "LlamaModel",
        "T5ForConditionalGeneration",
        "BartForConditionalGeneration",
        "PegasusForConditionalGeneration",
    ],
)
def test_models_of_other_tasks_are_rejected(class_name, save):
    """A GPT-2 classifier has all weights of the language model, as the head is tied to the embedding."""
    with pytest.raises(UserError, match=class_name):
        loading.load_causal_lm(str(save(class_name)))


@pytest.mark.parametrize("class_name", ["GPT2LMHeadModel", "GPT2Model", "GPT2DoubleHeadsModel", "BartForCausalLM"])
def test_models_with_a_vocabulary_head_load(class_name, save):
    loading.load_causal_lm(str(save(class_name)))


def test_a_reward_model_is_rejected_and_a_missing_class_name_accepted(save):
    folder = save("GPT2LMHeadModel")
    config = json.loads((folder / "config.json").read_text())
    for architectures, is_refused in ((["GPT2ForRewardModel"], True), (None, False), ([], False)):
        (folder / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
        if is_refused:
            with pytest.raises(UserError, match="GPT2ForRewardModel"):
                loading.load_causal_lm(str(folder))
        else:
            loading.load_causal_lm(str(folder))
