"""Samples of a model, printed."""

from dataclasses import MISSING, dataclass

from ..core.arguments import Config, setting
from ..core.streams import silence_libraries
from ..evaluation.samples import generate_samples
from ..model.limits import check_token_ids
from ..model.loading import load_causal_lm


@dataclass
class SampleConfig(Config):
    """Settings of the command."""

    model: str = setting(MISSING, "folder or Hub id of a causal language model and its tokenizer", path=True)
    prompt: str = setting("Hello, I'm a language model,", "text to continue")
    n_samples: int = setting(4, "samples to draw", least=1)
    n_tokens: int = setting(32, "tokens of a sample, including the prompt's", least=1)
    top_k: int = setting(50, "draw among this many of the likeliest tokens", least=1)
    seed: int = setting(0, "of the draws")
    trust_remote_code: bool = setting(False, "run model code in the folder or repository")


def run(config: SampleConfig) -> None:
    """Load a model and print samples of it."""
    silence_libraries()
    model, tokenizer = load_causal_lm(config.model, trust_remote_code=config.trust_remote_code)
    prompt_ids = tokenizer(config.prompt, add_special_tokens=False)["input_ids"]
    check_token_ids(model, max(prompt_ids, default=0), config.model)
    options = {name: getattr(config, name) for name in ("n_samples", "n_tokens", "top_k", "seed")}
    samples = generate_samples(model, tokenizer, config.prompt, **options)
    print("\n".join(f"> {text}" for text in samples))
