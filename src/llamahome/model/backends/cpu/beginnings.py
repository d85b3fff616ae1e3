"""Tokens with which all documents of a micro-batch begin, such as a system prompt, are computed once.

In a causal decoder the state of a token depends on the tokens up to it alone, so equal beginnings have equal states, and the gradient of
the one is the sum over all. The loss and its gradient stay the same but for rounding; the work shrinks by the tokens left out. Not done
where chance differs between copies (dropout), nor by attention back ends that need every token at its place.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_WORTH = 0.02
"""Share of the tokens that must fall away: below it the copies cost as much as they save."""


@dataclass(frozen=True)
class Laid:
    """The tokens that are computed: the shared ones, then what each document has of its own. C tokens, N targets."""

    tokens_C: Tensor
    positions_C: Tensor
    rows_N: Tensor
    """Places of the states that predict the targets; a shared one may stand there for several documents."""
    shared: int
    """How many tokens are shared; 0 when everything stays as it was."""


def common_tokens(tokens_T: Tensor, lengths: tuple[int, ...]) -> int:
    """With how many equal tokens all documents begin; at least one token of each is left its own."""
    common, tokens = min(lengths) - 1, tokens_T.numpy()  # by numpy: the torch of a step asks no tensor for its value
    first, start = tokens[:common], lengths[0]
    for length in lengths[1:]:
        different = np.flatnonzero(tokens[start : start + common] != first[:common])
        common = int(different[0]) if len(different) else common
        start += length
    return common


def lay_once(tokens_T: Tensor, positions_T: Tensor, rows_N: Tensor, lengths: tuple[int, ...]) -> Laid:
    """Lay a micro-batch out without the repeated beginnings; tokens on the processor."""
    shared = common_tokens(tokens_T, lengths) if len(lengths) > 1 else 0
    if shared * (len(lengths) - 1) < _WORTH * len(tokens_T):
        return Laid(tokens_T, positions_T, rows_N, 0)
    own = positions_T >= shared
    own[:shared] = True
    kept = own.nonzero().squeeze(1)
    place_T = own.cumsum(0) - 1
    place_T = torch.where(own, place_T, positions_T)
    return Laid(tokens_T[kept], positions_T[kept], place_T[rows_N], shared)


def draws_lots(model: PreTrainedModel) -> bool:
    """Whether two copies of a token may come out differently: dropout while training, of a layer or of the model's own settings."""
    if not model.training:
        return False
    named = (value for name, value in vars(model.config).items() if "drop" in name and isinstance(value, float))
    layers = (module.p for module in model.modules() if isinstance(module, nn.Dropout))
    return any(chance > 0 for chance in (*named, *layers))
