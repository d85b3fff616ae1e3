"""AdamW over the trained weights, and the rule for a learning rate that nobody set."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

_FULL_AT_2000 = 5e-5
_LORA_FACTOR = 10.0
_WIDTH_POWER = 0.78
"""Wider models want smaller steps: rate ~ (2000 / hidden size) ^ 0.78, and LoRA ten times the rate of full fine-tuning. Source: the fit
for Llama models in "LoRA Without Regret" (Thinking Machines, 2025). Other families and our check: docs/decisions/0004-learning-rate.md."""


def auto_learning_rate(method: str, hidden_size: int) -> float:
    """The rate for training.learning_rate auto, to two digits: 1.3e-3 for LoRA at hidden size 576, 2.9e-4 at 4,096, a tenth for full."""
    rate = _FULL_AT_2000 * (2000 / hidden_size) ** _WIDTH_POWER * (_LORA_FACTOR if method == "lora" else 1.0)
    return float(f"{rate:.1e}")


def make_optimizer(kind: Literal["adamw"], parameters: Mapping[str, nn.Parameter], *, weight_decay: float) -> torch.optim.AdamW:
    """The optimizer `kind`, fused, float32 state; matrices decay, vectors (biases, norms, magnitudes) do not. The loop sets the rate."""
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    makers = {"adamw": torch.optim.AdamW}
    return makers[kind]([group for group in groups if group["params"]], lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate


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
    part: Callable[[str, Tensor], Tensor] = lambda name, whole: whole,
) -> None:
    """Put saved state back, bit for bit; KeyError names a parameter whose state is missing.

    `part` gives this process's rows of a whole tensor that belongs to the weight of that name.
    """
    if not tensors:
        return
    for name, parameter in parameters.items():
        state: dict[str, Any] = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            state[key] = part(name, tensors[f"{name}.{key}"]).to(parameter.device, copy=True)
        optimizer.state[parameter] = state
