"""Configurations of any architecture in transformers, small enough to build in every test."""

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# By parameter name in transformers' configurations; each configuration gets the ones that it has.
SIZES = {
    "vocab_size": 101,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 1,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 8,
    "d_ff": 64,
    "d_kv": 8,
    "state_size": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "attention_hidden_size": 32,
    "attention_types": [[["global"], 2]],
}
NAMES_BY_SIZE = {
    2: ("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "num_layers"),
    4: ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"),
    32: ("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim", "emb_dim"),
    64: (
        "intermediate_size",
        "ffn_dim",
        "decoder_ffn_dim",
        "encoder_ffn_dim",
        "d_inner",
        "max_position_embeddings",
        "n_positions",
    ),
}
SIZES |= {name: size for size, names in NAMES_BY_SIZE.items() for name in names}


def build_config(model_type: str, **changes) -> PreTrainedConfig:
    default = CONFIG_MAPPING[model_type]()
    sizes = {name: size for name, size in SIZES.items() if hasattr(default, name)}
    if model_type == "xlnet":  # unlimited, and raises if given a limit
        del sizes["max_position_embeddings"]
    return type(default)(**sizes | changes)
