"""Compute the summed loss of a micro-batch: the decoder, then the output head at the target positions only.

Adapters, precision and attention are hidden from the training loop here. Legend: T tokens, N targets, D hidden size.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamahome.model.backends.backend import Backend, Batch, Pass
from llamahome.model.backends.loss import HeadStats
from llamahome.model.backends.token_losses import TokenLoss, label_log_probabilities
from llamahome.model.load import head_of
from llamahome.model.lora_layers import adapters_off
from llamahome.model.packing import last_hidden

T = TypeVar("T")


def directly(work: Callable[[], T], otherwise: Callable[[Tensor], T] | None = None, /) -> T:
    """Call `work`; for models whose weights are not sharded."""
    del otherwise
    return work()


class Within(Protocol):
    """Calls a function that reads whole weights, after gathering sharded weights from other processes.

    If memory runs out in a pass in which others wait, `otherwise` makes its meaningless value of the hidden states that are there.
    """

    def __call__(self, work: Callable[[], T], otherwise: Callable[[Tensor], T] | None = None, /) -> T: ...  # noqa: D102


@dataclass(frozen=True)
class Objective:
    """Supervised fine-tuning: the sum over all targets of -log p(target | earlier tokens of its document)."""

    model: PreTrainedModel
    """The causal language model with its adapters, not PEFT's wrapper."""
    backend: Backend
    within: Within = directly
    unit: ClassVar[str] = "target"
    measured: ClassVar[tuple[str, ...]] = ()

    def units(self, batch: Batch) -> tuple[int, ...]:
        """The number of targets."""
        return (len(batch.labels_N),)

    def loss_sum(self, batch: Batch) -> Tensor:
        """() float32, in nats, summed over the targets of `batch`; differentiable."""
        return self.within(lambda: self.backend.loss_sum(self._hidden(batch), batch.labels_N, head_of(self.model)), _nothing)

    def loss_of(self, batch: Batch, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """`loss` of log p(target | earlier tokens of its document), [N] float32, for every target of `batch`; differentiable."""
        return self.within(lambda: loss(self.backend.logprobs(self._hidden(batch), batch.labels_N, head_of(self.model))), _nothing)

    def token_loss_sum(self, batch: Batch, loss: TokenLoss) -> Tensor:
        """() float32, another loss summed over the targets of `batch`; differentiable."""
        return self.within(lambda: self.backend.token_loss_sum(self._hidden(batch), head_of(self.model), loss), _nothing)

    @torch.no_grad()
    def reference_logs(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """float32 [N]: log p(label) of the model without its adapters, in a pass of its own."""

        def logs() -> Tensor:
            head, dtype = head_of(self.model), self.backend.precision.compute
            return label_log_probabilities(self._hidden(batch), batch.labels_N, head, dtype=dtype, temperature=temperature)

        with adapters_off(self.model):
            return self.within(logs, lambda hidden: torch.zeros(len(batch.labels_N), device=hidden.device))

    @torch.no_grad()
    def stats(self, batch: Batch) -> HeadStats:
        """The summed loss and the number of targets ranked first. The caller sets evaluation mode."""
        nothing = HeadStats(torch.zeros((), device=batch.labels_N.device), torch.zeros((), device=batch.labels_N.device))
        work = partial(self._stats, batch)
        return self.within(work, lambda hidden: nothing)

    def _stats(self, batch: Batch) -> HeadStats:
        return self.backend.stats(self._hidden(batch), batch.labels_N, head_of(self.model))

    @torch.no_grad()
    def stats_each(self, batch: Batch, targets: Sequence[int]) -> list[HeadStats]:
        """`stats` of each document of `batch`, which have so many `targets`, at least one each, after one pass of the decoder."""

        def each() -> list[HeadStats]:
            parts = zip(torch.split(self._hidden(batch), list(targets)), torch.split(batch.labels_N, list(targets)), strict=True)
            return [self.backend.stats(hidden, labels, head_of(self.model)) for hidden, labels in parts]

        return self.within(each)

    def _hidden(self, batch: Batch) -> Tensor:
        """The hidden states [N, D] that predict the targets."""
        laid = self.backend.make_pass(batch, self.model)
        return hidden_states(self.model, laid, self.backend).index_select(0, laid.rows_N)


def _nothing(hidden: Tensor) -> Tensor:
    """A loss of 0 with a backward pass through the layers that made `hidden`."""
    return hidden.sum() * 0


def hidden_states(model: PreTrainedModel, laid: Pass, backend: Backend) -> Tensor:
    """The decoder's last hidden states [T, D], with matrix products in the dtype of the back end's precision."""
    precision = backend.precision
    context = torch.autocast(laid.tokens_T.device.type, precision.compute) if precision.autocast else nullcontext()
    with context:
        return last_hidden(model, laid.tokens_T, laid.positions_T, laid.documents, attend=backend.attend)
