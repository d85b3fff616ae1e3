"""AdamW over the trained weights, its learning rate and its state."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn


def make_optimizer(
    kind: Literal["adamw"], parameters: Mapping[str, nn.Parameter], *, weight_decay: float, plus_ratio: float = 1.0
) -> torch.optim.AdamW:
    """The optimizer `kind`, fused, with float32 state. Matrices decay, vectors (biases, norms, magnitudes) do not.

    `plus_ratio` is the learning rate of LoRA's B matrices over that of the others (LoRA+, arXiv 2402.12354).
    """
    faster = {id(weight) for name, weight in parameters.items() if plus_ratio != 1.0 and ".lora_B." in name}
    matrices = [weight for weight in parameters.values() if weight.ndim >= 2 and id(weight) not in faster]
    vectors = [weight for weight in parameters.values() if weight.ndim < 2]
    b_matrices = [weight for weight in parameters.values() if id(weight) in faster]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
        {"params": b_matrices, "weight_decay": weight_decay, "rate_factor": plus_ratio},
    ]
    makers = {"adamw": torch.optim.AdamW}
    return makers[kind]([group for group in groups if group["params"]], lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)


def allocate_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make the state of every weight that has a gradient and no state, as AdamW does in a first update, but before any weight changes."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None and not optimizer.state.get(weight):
                moments = {name: torch.zeros_like(weight, memory_format=torch.preserve_format) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[weight] = {"step": torch.zeros((), dtype=torch.float32, device=weight.device), **moments}


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """State as `<parameter name>.<moment>` -> tensor, for safetensors; empty before the first update."""
    return {
        f"{name}.{key}": value.detach()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    *,
    local: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> None:
    """Restore saved state, bit for bit; KeyError names a parameter whose state is missing.

    `local` returns the rows of this rank, from the name of a weight and a tensor of its full shape.
    """
    if not tensors:
        return
    for name, parameter in parameters.items():
        state: dict[str, Any] = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            state[key] = local(name, tensors[f"{name}.{key}"]).to(parameter.device, copy=True)
        optimizer.state[parameter] = state
