"""Configuration of the GPT-2 reproduction. Every checkpoint includes it, so it imports nothing from the package."""

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# Layers, heads and width of OpenAI's four models (Radford et al. 2019, table 2), keyed by parameter count.
MODEL_SIZES = {
    "124M": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "350M": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "774M": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "1558M": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}

# Options of `transformers.GPT2Config` that change what the same weights compute, with their only supported values.
GPT2_OPTIONS = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}

# The classes that `trust_remote_code=True` loads from a saved folder.
AUTO_MAP = {
    "AutoConfig": "configuration_gpt2_repro.GPT2ReproConfig",
    "AutoModel": "modeling_gpt2_repro.GPT2ReproModel",
    "AutoModelForCausalLM": "modeling_gpt2_repro.GPT2ReproForCausalLM",
}


@strict
class GPT2ReproConfig(PreTrainedConfig):
    """Configuration of a GPT-2 model, with the field names of `transformers.GPT2Config`. The defaults are GPT-2 124M.

    `from_pretrained` also reads folders whose `model_type` is `gpt2`, except for their dropout: that is a property of
    a training run, not of the weights, so it is 0.0 unless requested (`from_pretrained(..., resid_pdrop=0.1)`).

    Args:
        vocab_size: rows of the token embedding and of the tied head; GPT-2's tokenizer has 50,257 ids.
        n_positions: maximum sequence length in tokens, i.e. rows of the learned position embedding.
        n_embd: width of the residual stream; must be divisible by `n_head`.
        n_layer: number of transformer blocks.
        n_head: attention heads per block.
        n_inner: width of the MLP's hidden layer; `None` means `4 * n_embd`.
        activation_function: GPT-2 uses the tanh approximation of GELU, which transformers calls `gelu_new`.
        resid_pdrop, embd_pdrop, attn_pdrop: dropout probabilities; 0.0 because each pre-training token is seen once.
        layer_norm_epsilon: added to the variance in every layer norm.
        initializer_range: standard deviation of the initial weights; residual projections and the position embedding
            use a fraction of it.

    Raises:
        ValueError: `n_embd` is not divisible by `n_head`, an option of `transformers.GPT2Config` is not supported, or
            the model is of another type.
    """

    model_type = "gpt2_repro"
    _auto_class = "AutoConfig"  # makes `save_pretrained` copy this file
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float | int = 0.0
    embd_pdrop: float | int = 0.0
    attn_pdrop: float | int = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        for name, known in GPT2_OPTIONS.items():
            if kwargs.get(name, known) != known:
                raise ValueError(f"{name}={kwargs[name]} is not supported, only {name}={known} is")
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        super().__post_init__(**kwargs)
        # Set here because saving a model registers only the saved class, and a folder must open with all three.
        self.auto_map = dict(AUTO_MAP)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type == "gpt2":
            config_dict = {name: value for name, value in config_dict.items() if not name.endswith("_pdrop")}
        elif model_type != cls.model_type:
            raise ValueError(f"{pretrained_model_name_or_path} is a {model_type} model, not GPT-2")
        return {**config_dict, "model_type": cls.model_type}, kwargs


__all__ = ["MODEL_SIZES", "GPT2ReproConfig"]
