"""The optimizer of a run. Another one would be built here, and chosen in `run.build_model_and_optimizer`.

Its name would be an `experiment(...)` in `config.py`, with a value for older checkpoints in
`start.load_resumed_state`, or all of them are refused. `publishing/model_card.md` names AdamW too. Its state is saved
by `checkpoint.save_checkpoint` and loaded by `checkpoint.load_optimizer_state`, as any `state_dict` that `torch.load`
reads with `weights_only=True`. What is estimated of disk and memory counts `N_MOMENTS`.
"""

import torch
from torch import nn

# Values that AdamW keeps of each parameter, in float32.
N_MOMENTS = 2


def build_adamw(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Build AdamW that decays matrices and embeddings, and leaves biases and layer norms alone.

    A tied tensor counts once. The fused implementation is used where torch has one: it computes the same update five
    times as fast on a CPU.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in ("cuda", "cpu") for parameter in parameters)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
