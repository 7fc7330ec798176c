"""GPT-2 as a transformers model. Every checkpoint includes this file, so it imports only its configuration.

Modules use the names, shapes and layout of OpenAI's checkpoints (`Conv1D` stores weights as (in, out)), so state dicts
are interchangeable with those of `GPT2LMHeadModel` without conversion.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_gpt2_repro import GPT2ReproConfig

# Positions per chunk of the training loss, whose logits are in memory at once: few on CPU, enough to keep a GPU busy.
LOSS_CHUNK_TOKENS, OTHER_LOSS_CHUNK_TOKENS = {"cpu": 1024, "cuda": 8192}, 2048


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention explicitly. This is the only implementation that can return the attention weights.

    Shapes: `query` (batch, heads, queries, head_dim), `key` and `value` (batch, heads, keys, head_dim), additive mask
    (batch, 1, queries, keys), output (batch, queries, heads, head_dim), weights (batch, heads, queries, keys).
    """
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def select_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Return the hidden states to compute logits for: (batch, kept, n_embd), or (kept, n_embd) for a boolean mask.

    Args:
        logits_to_keep: a number of final positions (0: all), a tensor of indices, (kept,) or (batch, kept), or a
            boolean mask (batch, sequence).
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.dim() == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.take_along_dim(logits_to_keep.unsqueeze(-1), dim=1)


class HeadCrossEntropy(torch.autograd.Function):
    """Vocabulary head fused with its cross-entropy, in chunks of positions: the full logits are never materialized.

    `apply(hidden_states, weight, targets, chunk_tokens)` takes (tokens, n_embd), (vocab_size, n_embd), (tokens,) ids
    (-100 is ignored) and a chunk size (`None`: chosen by device), and returns the summed negative log-likelihood in
    nats. The forward pass also computes the gradients, while a chunk's logits are in memory, so nothing is recomputed.
    Matrix products run in autocast's dtype, everything after them in float32. Tensor cores prefer multiples of 128
    rows, and 50,257 is not one: the weight is padded for the product, and the padding masked to a probability of
    exactly 0.
    """

    @staticmethod
    # pyrefly: ignore[bad-override]  torch's own signature is (*args, **kwargs)
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        chunk_tokens: int | None,
    ) -> torch.Tensor:
        device_type, vocab_size = hidden_states.device.type, weight.shape[0]
        chunk_tokens = chunk_tokens or LOSS_CHUNK_TOKENS.get(device_type, OTHER_LOSS_CHUNK_TOKENS)
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
        head = nn.functional.pad(weight.to(dtype), (0, 0, 0, -vocab_size % 128))
        rows, loss = torch.arange(head.shape[0], device=head.device), torch.zeros((), device=head.device)
        grad_states, grad_head = torch.empty_like(hidden_states), torch.zeros_like(head, dtype=torch.float32)
        for start in range(0, hidden_states.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            states, ids = hidden_states[chunk].to(dtype), targets[chunk].unsqueeze(1)
            # Updated in place, from logits to exponentials to gradients: this buffer dominates a chunk's memory.
            buffer = (states @ head.t()).float()
            buffer[:, vocab_size:] = -math.inf
            target_logits = buffer.sub_(buffer.amax(dim=-1, keepdim=True)).gather(1, ids.clamp(min=0))
            sums = buffer.exp_().sum(dim=-1, keepdim=True)
            loss = loss + ((sums.log() - target_logits) * (ids != -100)).sum()  # torch 2.11 cannot compile += here
            if any(ctx.needs_input_grad):  # the gradient with respect to the logits: softmax minus one-hot target
                buffer = buffer.mul_((ids != -100) / sums).add_(ids == rows, alpha=-1).to(dtype)
                grad_states[chunk] = buffer @ head
                grad_head += buffer.t() @ states
            del buffer  # before the next one is allocated
        ctx.save_for_backward(grad_states, grad_head[:vocab_size].to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  torch's own signature is (ctx, *grad_outputs)
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(grad_loss * grad for grad in ctx.saved_tensors), None, None


class GPT2ReproAttention(nn.Module):
    """Causal multi-head self-attention with a fused projection for queries, keys and values."""

    def __init__(self, config: GPT2ReproConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        # pyrefly: ignore[bad-argument-type]  torch annotates a module's attributes as tensors and modules only
        self.c_proj.init_scale = 1 / math.sqrt(2 * config.n_layer)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        query, key, value = (
            states.view(*input_shape, -1, self.head_dim).transpose(1, 2)
            for states in self.c_attn(hidden_states).split(self.config.n_embd, dim=-1)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        # pyrefly: ignore[bad-argument-type]  the attention is set, because the model exists
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attn_pdrop if self.training else 0.0
        attn_output, attn_weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        attn_output = self.c_proj(attn_output.reshape(*input_shape, -1))
        return self.resid_dropout(attn_output), attn_weights


class GPT2ReproMLP(nn.Module):
    """Position-wise feed-forward layer."""

    def __init__(self, config: GPT2ReproConfig):
        super().__init__()
        n_inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
        self.c_fc = Conv1D(n_inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, n_inner)
        # pyrefly: ignore[bad-argument-type]  torch annotates a module's attributes as tensors and modules only
        self.c_proj.init_scale = 1 / math.sqrt(2 * config.n_layer)
        self.act = ACT2FN[config.activation_function]
        if config.activation_function == "gelu_new":  # the same function in one kernel, not eight
            self.act = nn.GELU(approximate="tanh")
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class GPT2ReproBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block: attention and MLP, each added to the residual stream."""

    def __init__(self, config: GPT2ReproConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2ReproAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2ReproMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attn_output, _ = self.attn(self.ln_1(hidden_states), **kwargs)
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class GPT2ReproPreTrainedModel(PreTrainedModel):
    """Base class with what transformers needs to initialize, load, place and compile the model."""

    # pyrefly: ignore[bad-override-mutable-attribute]  narrowed, as in transformers' own models
    config: GPT2ReproConfig
    config_class = GPT2ReproConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPT2ReproBlock"]
    _input_embed_layer = "wte"
    _skip_keys_device_placement = ["past_key_values"]
    # OpenAI's files contain the causal mask as a buffer of each attention module.
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.(masked_)?bias$"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": GPT2ReproBlock, "attentions": GPT2ReproAttention}

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:  # any `nn.Module`; the attributes depend on its class
        """Initialize as GPT-2 does: weights normal with standard deviation `initializer_range`, biases 0, norms 1.

        Projections into the residual stream are scaled by 1/sqrt(number of residual layers), two per block (GPT-2
        paper, section 2.3); the position embedding uses half the token embedding's standard deviation (OpenAI's
        `src/model.py`). Each module stores its own scale because transformers visits only modules with parameters.
        """
        super()._init_weights(module)
        if isinstance(module, Conv1D) or hasattr(module, "init_scale"):
            std = self.config.initializer_range * getattr(module, "init_scale", 1.0)
            init.normal_(module.weight, mean=0.0, std=std)
        if isinstance(module, Conv1D):
            init.zeros_(module.bias)


class GPT2ReproModel(GPT2ReproPreTrainedModel):
    """Embeddings, blocks and the final layer norm: token ids to hidden states."""

    _auto_class = "AutoModel"  # makes `save_pretrained` copy this file and the configuration's

    def __init__(self, config: GPT2ReproConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        # pyrefly: ignore[bad-argument-type]  torch annotates a module's attributes as tensors and modules only
        self.wpe.init_scale = 0.5
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([GPT2ReproBlock(config, layer_idx) for layer_idx in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute hidden states (batch, sequence, n_embd) from `input_ids` (batch, sequence) or `inputs_embeds`.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`; a sequence longer than `n_positions`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        # For plain causal attention, sdpa needs no mask and is faster without one, but transformers would build one
        # when compiled (torch < 2.14).
        is_plain = all(argument is None for argument in (attention_mask, past_key_values, position_ids))
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            # The length of a static cache is a tensor, and reading its value would break a compiled graph.
            length = inputs_embeds.shape[1] + (past_length if isinstance(past_length, int) else 0)
            if length > self.config.n_positions:
                raise ValueError(f"input of {length} tokens is longer than n_positions ({self.config.n_positions})")
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + past_length
        mask_arguments = (inputs_embeds, attention_mask, past_key_values, position_ids)
        needs_mask = not is_plain or self.config._attn_implementation != "sdpa"
        causal_mask = create_causal_mask(self.config, *mask_arguments) if needs_mask else None
        hidden_states = self.drop(inputs_embeds + self.wpe(position_ids))
        kwargs |= {"past_key_values": past_key_values, "position_ids": position_ids}
        for block in self.h:
            hidden_states = block(hidden_states, attention_mask=causal_mask, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden_states), past_key_values=past_key_values)


class GPT2ReproForCausalLM(GPT2ReproPreTrainedModel, GenerationMixin):
    """GPT-2 with its language modeling head, which is tied to the token embedding.

    Attributes:
        loss_chunk_tokens: positions per chunk when the loss is computed without returning logits, which trades speed
            for memory; `None` chooses by device.
    """

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: GPT2ReproConfig):
        super().__init__(config)
        self.transformer = GPT2ReproModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.loss_chunk_tokens: int | None = None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits (batch, sequence, vocab_size) in the model's dtype and, given labels, the mean loss in nats.

        Args:
            labels: (batch, sequence) ids aligned with `input_ids`, shifted inside the model; -100 is ignored.
            shift_labels: (batch, sequence) ids of the next tokens, already shifted, as windows of T+1 tokens provide
                them. Not in the signature, because the Trainer would then require both kinds of labels.
            logits_to_keep: compute logits only for this many final positions, or for these indices; 0 means all.
            skip_logits: compute the loss of `shift_labels` without returning logits, which saves memory; default:
                only while training.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = select_positions(outputs.last_hidden_state, logits_to_keep)
        head, loss, logits = self.lm_head, None, None
        skip_logits = shift_labels is not None and (self.training if skip_logits is None else skip_logits)
        # With an adapter, a hook or an offloaded weight, only calling the head itself gives the right logits.
        has_hooks = head._forward_pre_hooks or head._forward_hooks or "forward" in vars(head)
        if skip_logits and type(head) is nn.Linear and head.bias is None and not has_hooks:
            loss = self._compute_loss_in_chunks(hidden_states, shift_labels, kwargs.get("num_items_in_batch"))
        else:
            logits = head(hidden_states)
            if labels is not None or shift_labels is not None:
                loss = self.loss_function(
                    logits, labels, vocab_size=self.config.vocab_size, shift_labels=shift_labels, **kwargs
                )
        return CausalLMOutputWithPast(loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions)

    def _compute_loss_in_chunks(
        self, hidden_states: torch.Tensor, targets: torch.Tensor, n_targets: int | torch.Tensor | None
    ) -> torch.Tensor:
        """Return the summed loss of `targets` (batch, sequence) divided by `n_targets`; default: all but -100."""
        needs_grad = torch.is_grad_enabled()
        # Evaluate in float32: OpenAI's weights give logits near -100, which in bfloat16 add 0.007 nats to the loss.
        with nullcontext() if needs_grad else torch.autocast(hidden_states.device.type, enabled=False):
            weight = self.lm_head.weight if needs_grad else self.lm_head.weight.detach()
            loss = HeadCrossEntropy.apply(
                hidden_states.flatten(0, 1), weight, targets.flatten(), self.loss_chunk_tokens
            )
        return loss / ((targets != -100).sum() if n_targets is None else n_targets)


__all__ = ["GPT2ReproForCausalLM", "GPT2ReproModel", "GPT2ReproPreTrainedModel"]
