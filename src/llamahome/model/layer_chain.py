"""The decoder layers of a model as a chain: what each gets from a text, how it is called, and the gradient of the loss behind the last one.

Each layer can then be run alone, in float32, whatever the type of the model. That the layers are such a chain is checked, not assumed.
Memory: what all layers get, in the type of the model, and a tile of logits.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from llamahome.model.backends.loss import summed_cross_entropy
from llamahome.model.generate import positions_of
from llamahome.model.load import decoder_layers, head_of, tokens_of_text
from llamahome.model.packing import decoder_of

_TEXT = Path(__file__).with_name("calibration.txt")
ROW_TOKENS = 256
"""Of each row of the text."""
_LEAST_ROWS, _MOST_ROWS = 16, 64
MOST_WORK = 1.75e12
"""Tokens times weights of the layers: the fewer weights, the more rows of the text, which takes some minutes on two cores."""
_ROWS_AT_ONCE = 4


class CannotCalibrate(Exception):
    """The layers of a model cannot be run one after the other; the message says why."""


@dataclass(frozen=True)
class Call:
    """What a decoder layer gets beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states after `layer`."""
        return _first(layer(hidden, *self.args, **self.kwargs))


@dataclass(frozen=True)
class Chain:
    """The layers of a decoder, and what they are given for each row of the text."""

    layers: Sequence[nn.Module]
    calls: Sequence[Call]
    """For each layer, with floating-point tensors in float32."""
    inputs: Sequence[Sequence[Tensor]]
    """For each layer, for each batch of rows: [rows, tokens, hidden] in the type of the model."""
    gradients: Sequence[Tensor]
    """Of the loss of each batch, summed over its tokens, with respect to what the last layer gives."""


def rows_of_text(base: Path, model: PreTrainedModel) -> Tensor:
    """int64 [rows, tokens]: parts of the text, spread evenly, in tokens of `base`; every other row begins with the token that
    begins a text, if there is one.

    There are 64 rows for up to 106 million weights, and down to 16 for more. Raises CannotCalibrate.
    """
    ids, begins = tokens_of_text(base, _TEXT.read_text(encoding="utf-8"))
    length = min(ROW_TOKENS, positions_of(model) or ROW_TOKENS)
    parts = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    weights = sum(weight.numel() for layer in decoder_layers(model) for weight in layer.parameters())
    count = max(_LEAST_ROWS, min(_MOST_ROWS, int(MOST_WORK / (weights * ROW_TOKENS)) // _ROWS_AT_ONCE * _ROWS_AT_ONCE))
    parts = [parts[number * len(parts) // count] for number in range(count if parts else 0)]
    if not parts:
        raise CannotCalibrate("its folder has no tokenizer that transformers opens")
    rows = torch.tensor(parts)
    if begins is not None:  # all later tokens attend to it, so much depends on it
        rows[::2] = rows[::2].roll(1, dims=1)
        rows[::2, 0] = begins
    if int(rows.max()) >= model.get_input_embeddings().weight.shape[0]:
        raise CannotCalibrate("its tokenizer has more tokens than its embedding")
    return rows


def chain_of(model: PreTrainedModel, rows: Tensor) -> Chain:
    """Run the whole model, as transformers runs it, on `rows`, [rows, tokens]. Raises CannotCalibrate if its layers are no chain."""
    with _frozen(model):
        watched = [Watched(model, batch) for batch in torch.split(rows, _ROWS_AT_ONCE)]
    calls = watched[0].calls
    if any(not _same(calls, other.calls) for other in watched[1:]):
        raise CannotCalibrate("what its layers get beside hidden states depends on the tokens")
    wide = [Call(tree_map_only(Tensor, _wide, call.args), tree_map_only(Tensor, _wide, dict(call.kwargs))) for call in calls]
    inputs = [[each.inputs[number] for each in watched] for number in range(len(calls))]
    return Chain(decoder_layers(model), wide, inputs, [each.gradient for each in watched])


class Watched:
    """A pass of the whole model, forwards, and backwards as far as its last layer."""

    def __init__(self, model: PreTrainedModel, batch: Tensor) -> None:
        self.calls: list[Call] = []
        self.inputs: list[Tensor] = []
        self._last: Tensor | None = None
        self._layers = decoder_layers(model)
        handles = []
        for layer in self._layers:
            handles.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
            handles.append(layer.register_forward_hook(self._after))
        try:
            hidden = decoder_of(model)(input_ids=batch, use_cache=False).last_hidden_state[:, :-1]
        finally:
            for handle in handles:
                handle.remove()
        if self._last is None or len(self.calls) != len(self._layers):
            raise CannotCalibrate("not all of its layers run once")
        head = head_of(model)
        loss = summed_cross_entropy(hidden.flatten(0, 1), batch[:, 1:].flatten(), head, dtype=head.weight_VD.dtype)
        self.gradient: Tensor = torch.autograd.grad(loss, [self._last])[0]

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not args or not isinstance(args[0], Tensor) or (self.calls and args[0] is not self._last):
            raise CannotCalibrate("a layer gets something else than what the layer before it gives")
        self.inputs.append(args[0].detach())
        self.calls.append(Call(args[1:], kwargs))

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self._last = _first(output)
        if layer is not self._layers[-1]:
            return output
        self._last = self._last.detach().requires_grad_()
        return (self._last, *output[1:]) if isinstance(output, tuple) else self._last


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight asks for a gradient, so that no layer keeps what it computes."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in trained:
            weight.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for weight in trained:
            weight.requires_grad_()


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _same(calls: Sequence[Call], others: Sequence[Call]) -> bool:
    pairs = zip(
        tree_leaves([[c.args, dict(c.kwargs)] for c in calls]), tree_leaves([[c.args, dict(c.kwargs)] for c in others]), strict=True
    )
    return all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b for a, b in pairs)
