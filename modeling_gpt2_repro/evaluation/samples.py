"""Samples of a language model: continuations of a prompt that are the same on any hardware."""

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.evaluation.scoring import evaluation_mode
from modeling_gpt2_repro.model.loading import get_max_positions


def generate_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    n_samples: int = 4,
    n_tokens: int = 32,
    top_k: int = 50,
    seed: int = 0,
) -> list[str]:
    """Continue `prompt` `n_samples` times to `n_tokens` tokens each (the prompt's included) and return the texts.

    Each sample draws from a CPU generator of its own, keyed by (seed, sample), over the `top_k` likeliest tokens: the
    caller's RNG is never touched and a sample does not depend on how many others there are. Keys and values are
    cached where the model has such. A sample is cut at the end-of-text token. `model` stays in the mode it was in.

    Raises:
        UserError: an empty prompt, or a prompt and sample that do not fit into the model's positions.
    """
    for name, value in (("n_samples", n_samples), ("n_tokens", n_tokens), ("top_k", top_k)):
        if value < 1:
            raise UserError(f"--{name} has to be 1 or more, not {value}")
    prompt_ids = encode_prompt(model, tokenizer, prompt, n_tokens)

    generators = [torch.Generator().manual_seed((seed * 1_000_003 + sample) % 2**63) for sample in range(n_samples)]
    ids = torch.tensor([prompt_ids] * n_samples, device=model.device)
    inputs = {"input_ids": ids, "use_cache": True}
    with evaluation_mode(model):
        while ids.shape[1] < n_tokens:
            outputs = model(**inputs)
            values, candidates = outputs.logits[:, -1].float().cpu().topk(min(top_k, outputs.logits.shape[-1]))
            if not values.softmax(-1).isfinite().all():
                raise UserError(
                    "the model's probabilities are no numbers: its weights are broken, by a --learning_rate that was "
                    "too high, or its precision is too low"
                )
            drawn = [
                torch.multinomial(probabilities, 1, generator=generator)
                for probabilities, generator in zip(values.softmax(-1), generators, strict=True)
            ]
            new_ids = candidates.gather(1, torch.stack(drawn)).to(ids.device)
            ids = torch.cat([ids, new_ids], dim=1)
            if (
                getattr(outputs, "past_key_values", None) is None
            ):  # a model with a state of another kind reads all anew
                inputs["input_ids"] = ids
            else:
                inputs |= {"input_ids": new_ids, "past_key_values": outputs.past_key_values}

    texts = []
    for row in ids.tolist():
        continuation = row[len(prompt_ids) :]
        if tokenizer.eos_token_id in continuation:
            continuation = continuation[: continuation.index(tokenizer.eos_token_id)]
        texts.append(tokenizer.decode(prompt_ids + continuation))
    return texts


def encode_prompt(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, n_tokens: int) -> list[int]:
    """Return the ids of a prompt that samples of `n_tokens` tokens can continue.

    Raises:
        UserError: there is nothing to continue, or no room to.
    """
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    n_positions = get_max_positions(model)
    if not prompt_ids:
        raise UserError("the prompt has no tokens: give at least one character")
    if len(prompt_ids) >= n_tokens:
        raise UserError(f"the prompt has {len(prompt_ids)} tokens already: ask for more than that, not {n_tokens}")
    if n_positions is not None and n_tokens > n_positions:
        raise UserError(f"a sample of {n_tokens} tokens is longer than the model's {n_positions} positions")
    return prompt_ids
