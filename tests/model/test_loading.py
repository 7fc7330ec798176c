"""Which models count as causal language models: those whose numbers for a token do not depend on what follows it."""

import json

import pytest
import torch
import transformers
from tiny_models import build_model
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import eval_hellaswag
import train
from modeling_gpt2_repro.__main__ import main as run_command
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE
from modeling_gpt2_repro.model import loading

# The sizes' names in transformers' configurations; each takes those that it knows.
SIZES = {
    **{"vocab_size": 101, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 1},
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim", "emb_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_inner"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **{"num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 8, "d_ff": 64, "d_kv": 8, "state_size": 4},
    **{"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    **{"shared_expert_intermediate_size": 32, "attention_hidden_size": 32, "attention_types": [[["global"], 2]]},
}
CAUSAL = ["gpt2", "gpt_neo", "gpt_neox", "gptj", "gpt_bigcode", "openai-gpt", "ctrl", "opt", "bloom", "mpt", "xglm"]
CAUSAL += ["llama", "mistral", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi", "phi3", "olmo2", "cohere", "stablelm"]
CAUSAL += ["mixtral", "qwen2_moe", "granitemoe", "gpt_oss"]  # whose experts sum in an order that depends on all tokens
CAUSAL += ["mamba", "rwkv", "recurrent_gemma", "qwen3_next"]  # whose past is a state
CAUSAL += ["bart", "biogpt", "modernbert-decoder"]
BIDIRECTIONAL = ["bert", "roberta", "xlm-roberta", "camembert", "electra", "big_bird", "roformer", "megatron-bert"]
BIDIRECTIONAL += ["xlnet", "xlm", "rembert", "ernie", "roc_bert"]


def build_config(model_type, **changes):
    default = CONFIG_MAPPING[model_type]()
    sizes = {name: size for name, size in SIZES.items() if hasattr(default, name)}
    if model_type == "xlnet":  # which has no limit, and raises where it is given one
        del sizes["max_position_embeddings"]
    return type(default)(**sizes | changes)


def build(model_type, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(build_config(model_type, **changes)).eval()


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize("model_type", CAUSAL)
def test_causal_models_are_known_in_any_precision(model_type, dtype):
    loading.check_causal(build(model_type).to(dtype), "x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", BIDIRECTIONAL)
def test_models_that_read_ahead_are_refused_in_any_precision(model_type, dtype):
    """Fresh ones, which attend to everything a little and to nothing much; XLNet does not run in bfloat16."""
    with pytest.raises(UserError, match=r"is not causal|does not run"):
        loading.check_causal(build(model_type).to(dtype), "x")


def test_an_encoder_that_is_made_a_decoder_is_causal():
    for model_type in ("bert", "roberta", "electra", "roformer"):
        assert not loading.reads_ahead(build(model_type, is_decoder=True))


@pytest.mark.parametrize("n_positions", [1, 2, 3, 7])
def test_sizes_leave_room_for_the_question(n_positions):
    assert not loading.reads_ahead(build_model(n_positions=n_positions, vocab_size=3))
    # RoBERTa's positions begin behind that of its padding.
    is_readable = n_positions > 2
    assert (
        loading.reads_ahead(build("roberta", max_position_embeddings=n_positions + 2, vocab_size=5)) or not is_readable
    )


def test_our_own_model_is_causal_and_stays_as_it_was():
    model = build_model()
    model.train()
    before = torch.get_rng_state()
    assert not loading.reads_ahead(model)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


class Windowed(GPT2LMHeadModel):
    """Looks one token ahead, and is causal in everything else."""

    def forward(self, *args, **kwargs):
        logits = super().forward(*args, **kwargs).logits
        return CausalLMOutput(logits=logits + logits.roll(-1, dims=1))


class Detached(GPT2LMHeadModel):
    """A model that autograd does not pass, as of some kernels for quantized weights."""

    def forward(self, *args, **kwargs):
        with torch.no_grad():
            return super().forward(*args, **kwargs)


class DetachedWindowed(Windowed):
    def forward(self, *args, **kwargs):
        with torch.no_grad():
            return super().forward(*args, **kwargs)


@pytest.mark.parametrize("kind, expected", [(Windowed, True), (Detached, False), (DetachedWindowed, True)])
def test_what_no_configuration_tells_is_found_out(kind, expected):
    assert loading.reads_ahead(kind(build_config("gpt2")).eval()) is expected


@pytest.fixture(scope="module")
def save(tmp_path_factory, tokenizer):
    """Save a model of transformers' with a tokenizer, and return the folder."""

    def save(class_name, **changes):
        kind = getattr(transformers, class_name)
        config = build_config(kind.config_class.model_type, vocab_size=len(tokenizer), **changes)
        folder = tmp_path_factory.mktemp("model")
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def test_every_command_refuses_what_reads_ahead(save, shards, tmp_path, capsys):
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
        *("GPT2ForSequenceClassification", "GPT2ForTokenClassification", "GPT2ForQuestionAnswering"),
        *("LlamaForSequenceClassification", "Gemma2ForSequenceClassification", "BertForSequenceClassification"),
        *("BertForMultipleChoice", "BertForNextSentencePrediction", "DistilBertForMaskedLM", "LlamaModel"),
        *("T5ForConditionalGeneration", "BartForConditionalGeneration", "PegasusForConditionalGeneration"),
    ],
)
def test_models_of_other_tasks_are_named(class_name, save):
    """A GPT-2 that classifies has all weights of one that speaks, as the head is the embedding."""
    with pytest.raises(UserError, match=class_name):
        loading.load_causal_lm(str(save(class_name)))


@pytest.mark.parametrize("class_name", ["GPT2LMHeadModel", "GPT2Model", "GPT2DoubleHeadsModel", "BartForCausalLM"])
def test_what_has_a_vocabulary_head_loads(class_name, save):
    model, _ = loading.load_causal_lm(str(save(class_name)))
    loading.check_causal(model, class_name)


def test_a_reward_model_and_a_nameless_one(save):
    folder = save("GPT2LMHeadModel")
    config = json.loads((folder / "config.json").read_text())
    for architectures, is_refused in ((["GPT2ForRewardModel"], True), (None, False), ([], False)):
        (folder / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
        if is_refused:
            with pytest.raises(UserError, match="GPT2ForRewardModel"):
                loading.load_causal_lm(str(folder))
        else:
            loading.load_causal_lm(str(folder))
