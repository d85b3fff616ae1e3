"""Rounds a base for the inputs that its layers get from a text (calibration.txt), which goes through them one after the other.

The layers that lose most by NF4 get int8 (importance.py). Each linear layer is rounded for what it gets behind the
layers that are rounded already, where tokens on which the loss depends more count more. Memory: one decoder layer in float32, products of
its inputs, [inputs, inputs], and what layer_chain.py says. Cost: about six passes over the text, and what compensated.py says. Nothing
is drawn; sums in another order, as on another processor, may round some numbers differently.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llamahome.model.compensated import to_int8_for, to_nf4_for
from llamahome.model.generate import as_transformers_runs_it
from llamahome.model.importance import importance_of, token_weights, worth_most
from llamahome.model.layer_chain import Call, CannotCalibrate, chain_of, rows_of_text
from llamahome.model.packed_weight import Packed
from llamahome.model.unsupported import first_line

_FAILURES = (TypeError, KeyError, AttributeError, ValueError, RuntimeError, IndexError)
"""Errors of a model's code whose layers do not run alone."""


class FittedLayers:
    """The weights of a loaded base in NF4 or 8 bits, rounded for their inputs when they are asked for in the order of the model."""

    def __init__(self, base: Path, model: PreTrainedModel, more_bytes: Mapping[str, int], room: int) -> None:
        """The linear layers to round are those of `more_bytes`, which says how much more memory each takes in int8.

        `room` is how much more all together may take. Raises CannotCalibrate.
        """
        self._model, self._path_of = model, {module: path for path, module in model.named_modules()}
        try:
            with as_transformers_runs_it(model):
                chain = chain_of(model, rows_of_text(base, model))
                self._importance = importance_of(chain, more_bytes, self._path_of)
        except _FAILURES as error:
            raise CannotCalibrate(f"its layers do not run one after the other: {first_line(error)}") from error
        self.in_8_bits = worth_most({path: layer.gain for path, layer in self._importance.items()}, more_bytes, room)
        """The layers that get int8."""
        hidden = [each.float() for each in chain.inputs[0]]
        self._layers = self._rounded(list(zip(chain.layers, chain.calls, strict=True)), hidden)
        self._found: dict[str, Packed] = {}

    def take(self, path: str) -> Packed | None:
        """The weight of the linear layer `path`, once; None if no text reaches it. Raises CannotCalibrate."""
        try:
            while path not in self._found and (more := next(self._layers, None)) is not None:
                self._found |= more
        except _FAILURES as error:
            raise CannotCalibrate(f"its layers do not run one after the other: {first_line(error)}") from error
        return self._found.pop(path, None)

    @torch.no_grad()
    def _rounded(self, layers: Sequence[tuple[nn.Module, Call]], hidden: Sequence[Tensor]) -> Iterator[dict[str, Packed]]:
        """The linear layers of each decoder layer, in their order; the model stays as it is."""
        with as_transformers_runs_it(self._model):
            for layer, call in layers:
                prefix, wide = self._path_of[layer], copy.deepcopy(layer).float()
                modules = {f"{prefix}.{name}": module for name, module in wide.named_modules()}
                chosen = {path: module for path, module in modules.items() if path in self._importance}
                weights = {path: self._weights(path, chosen, len(hidden)) for path in chosen}
                found: dict[str, Packed] = {}
                for paths, moments_II in _moments(wide, chosen, call, hidden, weights):
                    found |= self._fitted({path: chosen[path].weight for path in paths}, moments_II)
                for path, packed in found.items():
                    packed.fill(chosen[path].weight.data)
                hidden = [call.run(wide, each) for each in hidden]
                yield found

    def _fitted(self, weights: Mapping[str, Tensor], moments_II: Tensor) -> dict[str, Packed]:
        """Weights with the same inputs, rounded for these."""
        found: dict[str, Packed] = {}
        for in_8_bits, fit in ((False, to_nf4_for), (True, to_int8_for)):
            if paths := [path for path in weights if (path in self.in_8_bits) == in_8_bits]:
                found |= zip(paths, fit([weights[path] for path in paths], moments_II), strict=True)
        return found

    def _weights(self, path: str, chosen: Mapping[str, nn.Module], batches: int) -> list[Tensor] | None:
        """How much tokens count for `path` and the others of `chosen` that get the same inputs."""
        same = [self._importance[other] for other in chosen if self._importance[other].inputs_of == self._importance[path].inputs_of]
        return token_weights(same, batches)


def _moments(
    layer: nn.Module,
    chosen: Mapping[str, nn.Module],
    call: Call,
    hidden: Sequence[Tensor],
    weights: Mapping[str, list[Tensor] | None],
) -> list[tuple[list[str], Tensor]]:
    """Paths of linear layers that get the same inputs, and the sum of x x^T over these, each with its weight, float32 [I, I]."""
    sums: dict[str, Tensor] = {}
    groups: dict[str, list[str]] = {}
    last: tuple[str, Tensor | None] = ("", None)
    number = 0

    def see(path: str, x: Tensor) -> None:
        nonlocal last
        if x is not last[1]:
            last, flat, each = (path, x), x.reshape(-1, x.shape[-1]), weights[path]
            weighted = flat if each is None or len(each[number]) != len(flat) else flat * each[number].unsqueeze(1)
            sums[path] = torch.addmm(sums[path], weighted.t(), flat) if path in sums else weighted.t() @ flat
        if path not in groups.setdefault(last[0], []):
            groups[last[0]].append(path)

    handles = [module.register_forward_pre_hook(lambda _, inputs, path=path: see(path, inputs[0])) for path, module in chosen.items()]
    for number in range(len(hidden)):
        call.run(layer, hidden[number])
        last = ("", None)
    for handle in handles:
        handle.remove()
    return [(paths, sums[leader]) for leader, paths in groups.items()]
