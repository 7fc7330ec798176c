"""Samples drawn from a model."""

import copy

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from modeling_gpt2_repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.evaluation.samples import generate_samples

PROMPT = "Hello, I'm a language model,"


@pytest.fixture
def model() -> GPT2ReproForCausalLM:
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=2, n_head=2, n_embd=16, n_positions=24))
    with torch.no_grad():
        model.transformer.wte.weight.mul_(12)  # probabilities far from uniform, to expose wrong ones
    return model


def test_samples_depend_on_the_seed_alone_and_leave_the_rng(model, tokenizer):
    model.train()
    random_state = torch.get_rng_state()
    texts = generate_samples(model, tokenizer, PROMPT, n_tokens=20, seed=5)
    assert torch.equal(torch.get_rng_state(), random_state) and model.training
    torch.manual_seed(99)
    assert generate_samples(model, tokenizer, PROMPT, n_tokens=20, seed=5) == texts
    assert generate_samples(model, tokenizer, PROMPT, n_tokens=20, seed=6) != texts
    assert len(set(texts)) == 4
    assert all(text.startswith(PROMPT) for text in texts)


def test_a_sample_does_not_depend_on_the_others(model, tokenizer):
    texts = generate_samples(model, tokenizer, PROMPT, n_tokens=16, seed=5)
    assert generate_samples(model, tokenizer, PROMPT, n_tokens=16, seed=5, n_samples=2) == texts[:2]


def test_top_k_of_one_is_greedy_decoding(model, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = model.eval().generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    text = generate_samples(model, tokenizer, PROMPT, n_tokens=20, top_k=1, n_samples=1)[0]
    assert text == tokenizer.decode(expected[0])


def test_a_sample_stops_before_its_end_of_text_token(model, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    drawn = model.eval().generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0].tolist()
    end = drawn.index(drawn[ids.shape[1] + 3], ids.shape[1])
    ending = copy.deepcopy(tokenizer)
    ending.eos_token = tokenizer.convert_ids_to_tokens(drawn[end])
    (text,) = generate_samples(model, ending, PROMPT, n_tokens=20, top_k=1, n_samples=1)
    assert text == tokenizer.decode(drawn[:end]) != tokenizer.decode(drawn)


def test_a_model_without_a_kv_cache_rereads_the_prefix(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "initializer_range": 0.3}
    model = MambaForCausalLM(MambaConfig(vocab_size=50257, **sizes)).eval()
    (text,) = generate_samples(model, tokenizer, PROMPT, n_tokens=12, top_k=1, n_samples=1)
    ids = tokenizer(PROMPT)["input_ids"]
    while len(ids) < 12:
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    assert text == tokenizer.decode(ids)


def test_prompts_that_leave_no_room_are_rejected(model, tokenizer):
    with pytest.raises(UserError, match="no tokens"):
        generate_samples(model, tokenizer, "")
    with pytest.raises(UserError, match="8 tokens"):
        generate_samples(model, tokenizer, PROMPT, n_tokens=8)
    with pytest.raises(UserError, match="longer than the model's 24 positions"):
        generate_samples(model, tokenizer, PROMPT, n_tokens=25)
