"""From the tensors of one micro-batch to the summed loss of its targets: decoder, then the loss head on target positions only.

The loop calls the objective and knows nothing of adapters, precision or attention. Legend: T tokens, N targets, D hidden size.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamahome.model.backends.backend import Backend, Batch, Pass
from llamahome.model.backends.loss import HeadStats
from llamahome.model.load import head_of
from llamahome.model.packing import last_hidden

T = TypeVar("T")


def directly(work: Callable[[], T]) -> T:
    """Where every weight is at hand, work that needs them is just done."""
    return work()


class Within(Protocol):
    """Does work that reads whole weights, which may have to come from other processes first."""

    def __call__(self, work: Callable[[], T], /) -> T: ...  # noqa: D102


@dataclass(frozen=True)
class Objective:
    """Supervised fine-tuning: sum over targets of -log p(target | what stands before it in its document)."""

    model: PreTrainedModel
    """The causal language model itself, adapters inside, not the wrapper around it."""
    backend: Backend
    within: Within = directly

    def loss_sum(self, batch: Batch) -> Tensor:
        """() float32, nats, summed over the targets of `batch`; differentiable."""
        return self.within(lambda: self.backend.loss_sum(self._hidden(batch), batch.labels_N, head_of(self.model)))

    @torch.no_grad()
    def stats(self, batch: Batch) -> HeadStats:
        """Summed loss and number of targets ranked first; the caller sets evaluation mode."""
        return self.within(lambda: self.backend.stats(self._hidden(batch), batch.labels_N, head_of(self.model)))

    def _hidden(self, batch: Batch) -> Tensor:
        """[N, D], the states that predict the targets."""
        laid = self.backend.lay(batch, self.model)
        return hidden_states(self.model, laid, self.backend).index_select(0, laid.rows_N)


def hidden_states(model: PreTrainedModel, laid: Pass, backend: Backend) -> Tensor:
    """The decoder's last hidden states [T, D], products in the types of the back end's precision."""
    precision = backend.precision
    casts = torch.autocast(laid.tokens_T.device.type, precision.compute) if precision.autocast else nullcontext()
    with casts:
        return last_hidden(model, laid.tokens_T, laid.positions_T, laid.documents, attend=backend.attend)
