"""Samples from a language model: continuations of a prompt, with draws that do not depend on the device."""

import itertools
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import UserError
from ..model.limits import get_max_positions
from .scoring import evaluation_mode


def generate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    n_samples: int = 4,
    n_tokens: int = 32,
    top_k: int = 50,
    seed: int = 0,
) -> list[str]:
    """Draw `n_samples` continuations of `prompt`, each `n_tokens` tokens long including the prompt, as texts.

    Each sample is drawn from the `top_k` most likely tokens with its own CPU generator, seeded by (seed, sample), so
    the global RNG is untouched and a sample does not depend on the number of samples. A sample ends before its
    end-of-text token. The model's training mode is restored.

    Raises:
        UserError: the prompt is empty, or prompt and sample do not fit the model's positions.
    """
    prompt_ids = encode_prompt(model, tokenizer, prompt, n_tokens)
    generators = [torch.Generator().manual_seed((seed * 1_000_003 + sample) % 2**63) for sample in range(n_samples)]
    ids = torch.tensor([prompt_ids] * n_samples, device=model.device)
    with evaluation_mode(model):
        ids = extend_ids(model, ids, n_tokens, top_k, generators)

    drawn = [row[len(prompt_ids) :] for row in ids.tolist()]
    continuations = [itertools.takewhile(lambda id: id != tokenizer.eos_token_id, row) for row in drawn]
    return [str(tokenizer.decode([*prompt_ids, *continuation])) for continuation in continuations]


def extend_ids(
    model: PreTrainedModel, ids: torch.Tensor, n_tokens: int, top_k: int, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Extend token ids of shape (samples, length) to (samples, n_tokens), with one generator per sample.

    Keys and values are cached; a model that returns no `past_key_values` recomputes the whole sequence for each token.
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
    """Draw one token per sample from its `top_k` largest logits: (samples, vocab_size) to (samples, 1).

    Raises:
        UserError: the probabilities are not finite.
    """
    values, candidates = logits.float().cpu().topk(min(top_k, logits.shape[-1]))
    probabilities = values.softmax(-1)
    if not probabilities.isfinite().all():
        raise UserError(
            "the model's probabilities are not finite: its weights are broken (learning rate too high?) or its "
            "precision is too low"
        )
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
    return candidates.gather(1, torch.stack(drawn))


def encode_prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, n_tokens: int) -> list[int]:
    """Encode a prompt and check that samples of `n_tokens` tokens can continue it.

    Raises:
        UserError: the prompt is empty or leaves no room for a sample, or the samples exceed the model's positions.
    """
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    n_positions = get_max_positions(model)
    if not prompt_ids:
        raise UserError("the prompt has no tokens: pass at least one character")
    if len(prompt_ids) >= n_tokens:
        raise UserError(f"the prompt alone has {len(prompt_ids)} tokens: request more than that, not {n_tokens}")
    if n_positions is not None and n_tokens > n_positions:
        raise UserError(f"a sample of {n_tokens} tokens is longer than the model's {n_positions} positions")
    return prompt_ids
