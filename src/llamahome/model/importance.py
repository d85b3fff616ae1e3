"""How much the linear layers of a base count for its loss, and how much each token counts in them.

Both come from the gradients g of the loss with respect to the outputs of a layer, in the exact model on the text of layer_chain.py. The
cost of rounding a layer is half the sum over tokens of (g . dW x)^2, where x is what the layer gets and dW what plain rounding changes in
its weight: the sum of g g^T stands for the second derivative of the loss (the empirical Fisher matrix). A layer gains by 8 bits what that
cost is less there than in NF4. A token counts as much as its g^2.
Cost: three passes over the text. Memory: one decoder layer in float32, and what it keeps for its backward pass over four rows.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llamahome.model.layer_chain import Chain
from llamahome.model.packed_weight import Packed
from llamahome.model.rounding import SMALL_BLOCK, in_steps, steps_for, to_nf4

_KEPT_TOGETHER = 1 << 22
"""Numbers in each large tensor of `_Kept`."""


@dataclass
class LinearLayer:
    """What was found of a linear layer."""

    gain: float = 0.0
    """How much less rounding it to int8 adds to the loss of the text than rounding it to NF4, each number for itself,
    estimated: in nats, summed over the tokens."""
    tokens: list[Tensor] = field(default_factory=list)
    """For each time that it ran, the squared gradient of each token, summed over the outputs."""
    inputs_of: str = ""
    """The path of the first layer that gets the same inputs."""


class _Kept:
    """Small tensors copied into large ones.

    Kept one by one, they would lie between large tensors that are freed, and malloc could not use that memory again.
    """

    def __init__(self, together: int) -> None:
        self._free, self._together = torch.empty(0), together

    def copy_of(self, numbers_N: Tensor) -> Tensor:
        """float32 [N]: a copy."""
        if self._free.numel() < numbers_N.numel():
            self._free = torch.empty(max(self._together, numbers_N.numel()))
        copied, self._free = self._free[: numbers_N.numel()], self._free[numbers_N.numel() :]
        return copied.copy_(numbers_N)


def importance_of(
    chain: Chain, paths: Collection[str], path_of: Mapping[nn.Module, str], *, kept_together: int = _KEPT_TOGETHER
) -> dict[str, LinearLayer]:
    """The linear layers `paths`; runs the layers of `chain` from the last to the first. `path_of` has the paths of all modules."""
    found, kept = {path: LinearLayer() for path in paths}, _Kept(kept_together)
    behind = [gradient.float() for gradient in chain.gradients]
    for layer, call, inputs in reversed(list(zip(chain.layers, chain.calls, chain.inputs, strict=True))):
        prefix, wide = path_of[layer], copy.deepcopy(layer).float().requires_grad_(False)
        _watch({f"{prefix}.{name}": module for name, module in wide.named_modules() if f"{prefix}.{name}" in found}, found, kept)
        for number, each in enumerate(inputs):
            hidden = each.float().requires_grad_()
            with torch.enable_grad():
                (behind[number],) = torch.autograd.grad(call.run(wide, hidden), [hidden], behind[number])
    return found


def _watch(modules: Mapping[str, nn.Module], found: Mapping[str, LinearLayer], kept: _Kept) -> None:
    """Add what each pass of the linear layers `modules` shows to what was found."""
    last: tuple[str, Tensor | None] = ("", None)

    def after(path: str, changes: Sequence[Tensor], x: Tensor, output: Tensor) -> None:
        nonlocal last
        if x is not last[1]:
            last = path, x
        found[path].inputs_of = last[0]
        x = x.detach()

        def add(gradient: Tensor) -> None:
            in_4_bits, in_8_bits = (float((gradient * (x @ change_OI.t())).sum(-1).square().sum()) / 2 for change_OI in changes)
            found[path].gain += in_4_bits - in_8_bits
            found[path].tokens.append(kept.copy_of(gradient.square().sum(-1).flatten()))

        if output.requires_grad:
            output.register_hook(add)  # type: ignore[no-untyped-call]

    for path, module in modules.items():
        weight_OI: Any = module.weight
        changes = [_change(weight_OI, packed) for packed in (to_nf4(weight_OI, SMALL_BLOCK), in_steps(weight_OI, steps_for(weight_OI)))]
        module.register_forward_hook(lambda _, inputs, output, path=path, changes=changes: after(path, changes, inputs[0], output))


def _change(weight_OI: Tensor, packed: Packed) -> Tensor:
    rounded_OI = torch.empty(packed.shape)
    packed.fill(rounded_OI)
    return rounded_OI.sub_(weight_OI)


def worth_most(gains: Mapping[str, float], more_bytes: Mapping[str, int], room: int) -> frozenset[str]:
    """The layers with the greatest gain for each byte that they take more, as many as `room` bytes allow."""
    chosen: set[str] = set()
    for path in sorted(gains, key=lambda path: -gains[path] / more_bytes[path]):
        if more_bytes[path] <= room and gains[path] > 0:
            chosen.add(path)
            room -= more_bytes[path]
    return frozenset(chosen)


def token_weights(layers: Sequence[LinearLayer], batches: int) -> list[Tensor] | None:
    """For each batch, how much each token counts for layers with the same inputs, 1 in the mean; None if they did not run once in each.

    Half of it is the same for all tokens, so that no layer is rounded for a few tokens alone.
    """
    if any(len(layer.tokens) != batches for layer in layers):
        return None
    sums = [torch.stack(each).sum(0) for each in zip(*(layer.tokens for layer in layers), strict=True)]
    mean = torch.cat(sums).mean()
    return [(1 + each / mean) / 2 for each in sums] if mean > 0 else None
