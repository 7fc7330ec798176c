"""Models with random weights, their gradients, and the distance between two tensors."""

import torch

from modeling_gpt2_repro import GPT2ReproConfig, GPT2ReproForCausalLM

VOCAB_SIZE = 50257


def draw_model(shape: dict[str, int], n_positions: int) -> GPT2ReproForCausalLM:
    """Return a float32 model on the CPU whose every weight affects the loss, and whose attention spreads over tokens.

    Fresh weights would not do: biases and layer norms at 0 and 1 hide a mix-up, and attention is nearly uniform.
    """
    config = GPT2ReproConfig(**shape, vocab_size=VOCAB_SIZE, n_positions=n_positions)
    model = GPT2ReproForCausalLM(config).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "ln_" in name and name.endswith("weight")
            # Activations and attention scores of about 1, at any width.
            std = 0.1 if parameter.dim() < 2 or "wpe" in name or "wte" in name else 1.2 / config.n_embd**0.5
            parameter.copy_(is_scale + std * torch.randn(parameter.shape, generator=generator))
    return model


def draw_windows(n_windows: int, sequence_length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (n_windows, sequence_length + 1), generator=generator)


def compute_gradients(
    loss_model: torch.nn.Module, windows: torch.Tensor, precision: torch.dtype = torch.float32
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and its gradients by parameter name, and clear the gradients."""
    loss_model.zero_grad(set_to_none=True)
    with torch.autocast(windows.device.type, precision, enabled=precision != torch.float32):
        loss = loss_model(windows)
    loss.backward()
    gradients = {
        name.removeprefix("_orig_mod."): parameter.grad.cpu() for name, parameter in loss_model.named_parameters()
    }
    loss_model.zero_grad(set_to_none=True)
    return loss.item(), gradients


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference relative to the norm of the expected tensor."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert expected.norm() > 0
    return ((actual - expected).norm() / expected.norm()).item()


def assert_gradients_close(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], whole: float, each: float
) -> None:
    """Assert bounds on the relative error of the whole gradient and of each parameter's."""
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    vectors = (torch.cat([gradients[name].flatten() for name in expected]) for gradients in (actual, expected))
    assert relative_error(*vectors) < whole, errors
    assert max(errors.values()) < each, errors
