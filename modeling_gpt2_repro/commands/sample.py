"""The `sample` command: print samples from a model."""

from dataclasses import MISSING, dataclass

from ..core.arguments import Config, setting
from ..core.streams import silence_libraries
from ..core.terminal import fit_lines
from ..evaluation.samples import generate_samples
from ..model.limits import check_token_ids
from ..model.loading import load_causal_lm


@dataclass
class SampleConfig(Config):
    """Command-line flags."""

    model: str = setting(MISSING, "folder or Hub id of a causal language model and its tokenizer", path=True)
    prompt: str = setting("Hello, I'm a language model,", "text to continue")
    n_samples: int = setting(4, "number of samples", least=1)
    n_tokens: int = setting(32, "length of a sample in tokens, including the prompt", least=1)
    top_k: int = setting(50, "sample from this many of the most likely tokens", least=1)
    seed: int = setting(0, "random seed")
    trust_remote_code: bool = setting(False, "run the model code included with --model")


def run(config: SampleConfig) -> None:
    """Load a model and print samples from it."""
    silence_libraries()
    model, tokenizer = load_causal_lm(config.model, trust_remote_code=config.trust_remote_code)
    prompt_ids = tokenizer(config.prompt, add_special_tokens=False)["input_ids"]
    check_token_ids(model, max(prompt_ids, default=0), config.model)
    options = {name: getattr(config, name) for name in ("n_samples", "n_tokens", "top_k", "seed")}
    samples = generate_samples(model, tokenizer, config.prompt, **options)
    print("\n".join(fit_lines("\n".join(f"> {text}" for text in samples).split("\n"))))
