"""The optimizer over the trained weights, its learning rate and its state."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llamahome.config.optimizers import OptimizerName
from llamahome.training.optimizers import Adafactor, AdamW8bit, Muon, RefusableOptimizer, count


def make_optimizer(
    kind: OptimizerName,
    parameters: Mapping[str, nn.Parameter],
    *,
    weight_decay: float,
    plus_ratio: float = 1.0,
    tables: Collection[str] = (),
) -> torch.optim.Optimizer:
    """The optimizer `kind`, with float32 state unless its name says otherwise. Matrices decay, vectors (biases, norms, magnitudes) do not.

    `plus_ratio` is the learning rate of LoRA's B matrices over that of the others (LoRA+, arXiv 2402.12354). `tables` are the names of
    embeddings and head, which Muon leaves to AdamW.
    """
    groups: dict[str, dict[str, Any]] = {
        "matrices": {"params": [], "weight_decay": weight_decay, "rule": "muon"},
        "vectors": {"params": [], "weight_decay": 0.0, "rule": "adamw"},
        "tables": {"params": [], "weight_decay": weight_decay, "rule": "adamw"},
        "faster": {"params": [], "weight_decay": weight_decay, "rule": "adamw", "rate_factor": plus_ratio},
    }
    for name, weight in parameters.items():
        kept = kind == "muon" and (name in tables or weight.ndim != 2)  # Muon's rule is one for matrices
        faster = plus_ratio != 1.0 and ".lora_B." in name
        groups["vectors" if weight.ndim < 2 else "faster" if faster else "tables" if kept else "matrices"]["params"].append(weight)
    used = [group for group in groups.values() if group["params"]]
    if kind == "adamw":
        fused = torch.optim.AdamW(used, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
        fused.register_step_post_hook(_count_changes)
        return fused
    rules: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw_8bit": AdamW8bit, "adafactor": Adafactor, "muon": Muon}
    return rules[kind](used, {"lr": 0.0})


def _count_changes(optimizer: torch.optim.Optimizer, _args: Any, _options: Any) -> None:
    """Tell that the weights have changed, which torch's fused AdamW does not: copies in another dtype are kept until they change."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)


def allocate_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make the state of every weight that has a gradient and no state, as in a first update, but before any weight changes."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None and not optimizer.state.get(weight):
                optimizer.state[weight] = _fresh(optimizer, weight, group)


def _fresh(optimizer: torch.optim.Optimizer, weight: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    if isinstance(optimizer, RefusableOptimizer):
        with torch.no_grad():
            return optimizer.fresh(weight, group)
    moments = {name: torch.zeros_like(weight, memory_format=torch.preserve_format) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": count(weight), **moments}


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
    """Restore saved state, bit for bit; KeyError names a state that is missing, as of another optimizer.

    `local` returns the rows of this rank, from the name of a weight and a tensor of its full shape.
    """
    if not tensors:
        return
    groups = {weight: group for group in optimizer.param_groups for weight in group["params"]}
    for name, parameter in parameters.items():
        keys = _fresh(optimizer, parameter.detach().to("meta"), groups[parameter])
        state = {key: local(name, tensors[f"{name}.{key}"]).to(parameter.device, copy=True) for key in keys}
        optimizer.state[parameter] = state
