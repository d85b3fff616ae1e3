"""What each linear layer of a plain model gets and the gradient of the loss with respect to its outputs, by torch's own backward pass."""

import torch
from torch import Tensor, nn


def inputs_and_gradients(model: nn.Module, rows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """x [rows, tokens, inputs] and g [rows, tokens, outputs] of each linear layer but the head; the loss is summed over all tokens."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for path, module in model.named_modules():
        if type(module) is nn.Linear and path != "lm_head":

            def keep(_: nn.Module, inputs: tuple[Tensor], output: Tensor, path: str = path) -> None:
                output.retain_grad()
                kept[path] = inputs[0].detach(), output

            handles.append(module.register_forward_hook(keep))
    logits = model(input_ids=rows).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    found = {}
    for path, (x, output) in kept.items():
        assert output.grad is not None
        found[path] = x, output.grad
    return found


def same_inputs(found: dict[str, tuple[Tensor, Tensor]], path: str) -> list[str]:
    """The layers that get what `path` gets."""
    return [other for other, (x, _) in found.items() if x.shape == found[path][0].shape and torch.equal(x, found[path][0])]


def distance(found: Tensor, expected: Tensor) -> float:
    """Of two vectors, as a share of the length of the expected one."""
    return float((found - expected).norm() / expected.norm())
