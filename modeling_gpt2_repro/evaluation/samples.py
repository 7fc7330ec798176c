"""Samples of a language model: continuations of a prompt that are the same on any hardware."""

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..core.errors import UserError
from ..model.limits import get_max_positions
from .scoring import evaluation_mode


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

    Each sample draws from its own CPU generator, keyed by (seed, sample), over the `top_k` most likely tokens: the
    caller's RNG is never touched, and a sample does not depend on how many others there are. A sample ends before its
    end-of-text token. The model's training mode is restored.

    Raises:
        UserError: the prompt is empty, or prompt and sample do not fit into the model's positions.
    """
    prompt_ids = encode_prompt(model, tokenizer, prompt, n_tokens)
    generators = [torch.Generator().manual_seed((seed * 1_000_003 + sample) % 2**63) for sample in range(n_samples)]
    ids = torch.tensor([prompt_ids] * n_samples, device=model.device)
    with evaluation_mode(model):
        ids = extend_ids(model, ids, n_tokens, top_k, generators)

    drawn = [row[len(prompt_ids) :] for row in ids.tolist()]
    continuations = [itertools.takewhile(lambda id: id != tokenizer.eos_token_id, row) for row in drawn]
    return [tokenizer.decode([*prompt_ids, *continuation]) for continuation in continuations]


def extend_ids(
    model: nn.Module, ids: torch.Tensor, n_tokens: int, top_k: int, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Extend token ids of shape (samples, length) to (samples, n_tokens), each sample by its own generator.

    Keys and values are cached, unless a model has none: one with another kind of state reads all ids each time.
    """
    inputs = {"input_ids": ids, "use_cache": True}
    while ids.shape[1] < n_tokens:
        outputs = model(**inputs)
        new_ids = draw_tokens(outputs.logits[:, -1], top_k, generators).to(ids.device)
        ids = torch.cat([ids, new_ids], dim=1)
        if getattr(outputs, "past_key_values", None) is None:
            inputs["input_ids"] = ids
        else:
            inputs |= {"input_ids": new_ids, "past_key_values": outputs.past_key_values}
    return ids


def draw_tokens(logits: torch.Tensor, top_k: int, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Draw a token for each sample from its `top_k` largest logits: (samples, vocab_size) in, (samples, 1) out.

    Raises:
        UserError: the probabilities are not finite.
    """
    values, candidates = logits.float().cpu().topk(min(top_k, logits.shape[-1]))
    probabilities = values.softmax(-1)
    if not probabilities.isfinite().all():
        raise UserError(
            "the model's probabilities are not finite: its weights are broken (by too high a learning rate?), or its "
            "precision is too low"
        )
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
    return candidates.gather(1, torch.stack(drawn))


def encode_prompt(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, n_tokens: int) -> list[int]:
    """Return the ids of a prompt that samples of `n_tokens` tokens can continue.

    Raises:
        UserError: the prompt is empty, or leaves no room for a sample.
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
