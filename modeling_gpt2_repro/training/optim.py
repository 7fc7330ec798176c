"""The optimizer of a run.

To add another one: build it here, choose it in `run.build_model_and_optimizer` by an `experiment(...)` field of
`config.py`, give older checkpoints a value for that field in `start.load_resumed_state`, and name it in
`publishing/model_card.md`. `checkpoint.save_checkpoint` and `checkpoint.load_optimizer_state` handle any `state_dict`
that `torch.load` reads with `weights_only=True`. Estimates of disk and memory use `N_MOMENTS`.
"""

import torch
from torch import nn

# Values that AdamW stores per parameter, in float32.
N_MOMENTS = 2


def build_adamw(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Build AdamW with weight decay on matrices and embeddings, and none on biases and layer norms.

    A tied tensor is one parameter. The fused implementation is used where available: on a CPU it computes the same
    update five times as fast.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in ("cuda", "cpu") for parameter in parameters)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
