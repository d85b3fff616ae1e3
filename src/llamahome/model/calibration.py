"""Rounds a base for the inputs that its layers get from a text (calibration.txt), which goes through them one after the other.

Each linear layer is rounded for what it gets behind the layers that are rounded already, so that it makes good a part of their errors, too.
Memory: one decoder layer in float32, and products of its inputs, [inputs, inputs]. Cost: about three forward passes over 4,096 tokens, and
what compensated.py says. Nothing is drawn; sums in another order, as on another processor, may round some numbers differently.
"""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from llamahome.model.compensated import to_nf4_for
from llamahome.model.generate import as_transformers_runs_it, positions_of
from llamahome.model.load import decoder_layers, tokens_of_text
from llamahome.model.packed_weight import FourBit
from llamahome.model.packing import decoder_of
from llamahome.model.unsupported import first_line

_TEXT = Path(__file__).with_name("calibration.txt")
_ROWS, _TOKENS = 16, 256
"""Of the text."""
_ROWS_AT_ONCE = 4
_FAILURES = (TypeError, KeyError, AttributeError, ValueError, RuntimeError, IndexError)
"""Errors of a model's code whose layers do not run alone."""


class CannotCalibrate(Exception):
    """The layers of a model cannot be run one after the other; the message says why."""


@dataclass(frozen=True)
class _Call:
    """What a decoder layer gets beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states after `layer`."""
        output = layer(hidden, *self.args, **self.kwargs)
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found


class FittedLayers:
    """The weights of a loaded base in NF4, rounded for their inputs when they are asked for in the order of the model."""

    def __init__(self, base: Path, model: PreTrainedModel, paths: Collection[str]) -> None:
        self._layers, self._found = _rounded_layers(base, model, frozenset(paths)), dict[str, FourBit]()

    def take(self, path: str) -> FourBit | None:
        """The weight of the linear layer `path`, once; None if no text reaches it. Raises CannotCalibrate."""
        try:
            while path not in self._found and (more := next(self._layers, None)) is not None:
                self._found |= more
        except _FAILURES as error:
            raise CannotCalibrate(f"its layers do not run one after the other: {first_line(error)}") from error
        return self._found.pop(path, None)


def rows_of_text(base: Path, model: PreTrainedModel) -> Tensor:
    """int64 [rows, tokens]: parts of the text, spread evenly, in tokens of `base`. Raises CannotCalibrate."""
    ids, length = tokens_of_text(base, _TEXT.read_text(encoding="utf-8")), min(_TOKENS, positions_of(model) or _TOKENS)
    parts = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    parts = [parts[number * len(parts) // _ROWS] for number in range(_ROWS if parts else 0)]
    if not parts:
        raise CannotCalibrate("its folder has no tokenizer that transformers opens")
    rows = torch.tensor(parts)
    if int(rows.max()) >= model.get_input_embeddings().weight.shape[0]:
        raise CannotCalibrate("its tokenizer has more tokens than its embedding")
    return rows


@torch.no_grad()
def _rounded_layers(base: Path, model: PreTrainedModel, paths: Collection[str]) -> Iterator[dict[str, FourBit]]:
    """The linear layers `paths` of each decoder layer, in their order; the model stays as it is."""
    batches = torch.split(rows_of_text(base, model), _ROWS_AT_ONCE)
    path_of = {id(module): path for path, module in model.named_modules()}
    with as_transformers_runs_it(model):
        calls, hidden = _first_hidden(model, batches)
        for layer, call in zip(decoder_layers(model), calls, strict=True):
            prefix, wide = path_of[id(layer)], copy.deepcopy(layer).float()
            chosen = {name: module for name, module in wide.named_modules() if f"{prefix}.{name}" in paths}
            found: dict[str, FourBit] = {}
            for names, moments_II in _moments(wide, chosen, call, hidden):
                for name, packed in zip(names, to_nf4_for([chosen[name].weight for name in names], moments_II), strict=True):
                    packed.fill(chosen[name].weight.data)
                    found[f"{prefix}.{name}"] = packed
            hidden = [call.run(wide, each) for each in hidden]
            yield found


def _first_hidden(model: PreTrainedModel, batches: Sequence[Tensor]) -> tuple[list[_Call], list[Tensor]]:
    """How each decoder layer is called, and what the first of them gets for each batch, float32."""
    watched = [_Watched(model, batch) for batch in batches]
    calls = watched[0].calls
    if any(not _same(calls, other.calls) for other in watched[1:]):
        raise CannotCalibrate("what its layers get beside hidden states depends on the tokens")
    wide = [_Call(tree_map_only(Tensor, _wide, call.args), tree_map_only(Tensor, _wide, dict(call.kwargs))) for call in calls]
    return wide, [_wide(each.first) for each in watched]


class _Watched:
    """A forward pass of the whole decoder, and how its layers were called in it."""

    def __init__(self, model: PreTrainedModel, batch: Tensor) -> None:
        self.calls: list[_Call] = []
        self._last: Tensor | None = None
        handles = []
        for layer in decoder_layers(model):
            handles.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
            handles.append(layer.register_forward_hook(self._after))
        try:
            decoder_of(model)(input_ids=batch, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if len(self.calls) != len(decoder_layers(model)):
            raise CannotCalibrate("not all of its layers run once")

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not args or not isinstance(args[0], Tensor) or (self.calls and args[0] is not self._last):
            raise CannotCalibrate("a layer gets something else than what the layer before it gives")
        if not self.calls:
            self.first = args[0]
        self.calls.append(_Call(args[1:], kwargs))

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._last = output[0] if isinstance(output, tuple) else output


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _same(calls: Sequence[_Call], others: Sequence[_Call]) -> bool:
    pairs = zip(
        tree_leaves([[c.args, dict(c.kwargs)] for c in calls]), tree_leaves([[c.args, dict(c.kwargs)] for c in others]), strict=True
    )
    return all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b for a, b in pairs)


def _moments(layer: nn.Module, chosen: Mapping[str, nn.Module], call: _Call, hidden: Sequence[Tensor]) -> list[tuple[list[str], Tensor]]:
    """Names of linear layers that get the same inputs, and the sum of x x^T over these, float32 [I, I]."""
    sums: dict[str, Tensor] = {}
    groups: dict[str, list[str]] = {}
    last: tuple[str, Tensor | None] = ("", None)

    def see(name: str, x: Tensor) -> None:
        nonlocal last
        if x is not last[1]:
            last = (name, x)
            flat = x.reshape(-1, x.shape[-1])
            sums[name] = torch.addmm(sums[name], flat.t(), flat) if name in sums else flat.t() @ flat
        if name not in groups.setdefault(last[0], []):
            groups[last[0]].append(name)

    handles = [module.register_forward_pre_hook(lambda _, inputs, name=name: see(name, inputs[0])) for name, module in chosen.items()]
    for each in hidden:
        call.run(layer, each)
        last = ("", None)
    for handle in handles:
        handle.remove()
    return [(names, sums[leader]) for leader, names in groups.items()]
