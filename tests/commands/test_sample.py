"""The command that prints samples of a model."""

from modeling_gpt2_repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2_repro.__main__ import main
from modeling_gpt2_repro.model.folder import save_published_model

PROMPT = "Hello, I'm a language model,"


def save_model(folder, tokenizer, **shape) -> None:
    model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=1, n_head=2, n_embd=16, **shape))
    save_published_model(folder, model, tokenizer)


def test_samples_of_a_folder_are_printed(tokenizer, tmp_path, capsys):
    save_model(tmp_path, tokenizer, n_positions=24)
    assert main(["sample", f"--model={tmp_path}", f"--prompt={PROMPT}", "--n_samples=2", "--n_tokens=12"]) == 0
    assert capsys.readouterr().out.count(f"> {PROMPT}") == 2


def test_models_that_cannot_be_sampled_are_rejected(tokenizer, tmp_path, capsys):
    assert main(["sample"]) == 2
    assert main(["sample", "--model=missing/model"]) == 2
    assert "--model missing/model" in capsys.readouterr().err
    save_model(tmp_path, tokenizer, vocab_size=100)
    assert main(["sample", f"--model={tmp_path}", f"--prompt={PROMPT}"]) == 2
    assert "has embeddings for 100 token ids" in capsys.readouterr().err
