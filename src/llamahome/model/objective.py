"""From the tensors of one micro-batch to the summed loss of its targets: decoder, then the loss head on target positions only.

The loop calls the objective and knows nothing of adapters, precision or attention. Legend: T tokens, N targets, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamahome.model.backends.cpu.beginnings import Laid, draws_lots, lay_once
from llamahome.model.backends.cpu.native import Kernels
from llamahome.model.backends.documents import Documents, plan_documents
from llamahome.model.backends.loss import HeadStats, head_stats, summed_cross_entropy
from llamahome.model.load import head_of, last_hidden
from llamahome.model.precision import Precision

T = TypeVar("T")


def directly(work: Callable[[], T]) -> T:
    """Where every weight is at hand, work that needs them is just done."""
    return work()


class Within(Protocol):
    """Does work that reads whole weights, which may have to come from other processes first."""

    def __call__(self, work: Callable[[], T], /) -> T: ...  # noqa: D102


class LaidDocuments(Protocol):
    """Documents end to end, as data/records.py's Microbatch holds them."""

    @property
    def tokens_T(self) -> Tensor: ...  # noqa: D102
    @property
    def positions_T(self) -> Tensor: ...  # noqa: D102
    @property
    def lengths(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def rows_N(self) -> Tensor: ...  # noqa: D102
    @property
    def labels_N(self) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class Objective:
    """Supervised fine-tuning: sum over targets of -log p(target | what stands before it in its document)."""

    model: PreTrainedModel
    """The causal language model itself, adapters inside, not the wrapper around it."""
    backend: str
    """Attention: blocks, sdpa or reference."""
    precision: Precision
    within: Within = directly
    kernels: Kernels | None = None
    """Compiled passes for attention and the loss head."""

    def loss_sum(self, batch: LaidDocuments) -> Tensor:
        """() float32, nats, summed over the targets of `batch`; differentiable."""

        def work() -> Tensor:
            head, dtype = head_of(self.model), self.precision.compute
            return summed_cross_entropy(self._hidden(batch), batch.labels_N, head, dtype=dtype, kernels=self.kernels)

        return self.within(work)

    @torch.no_grad()
    def stats(self, batch: LaidDocuments) -> HeadStats:
        """Summed loss and number of targets ranked first; the caller sets evaluation mode."""

        def work() -> HeadStats:
            return head_stats(self._hidden(batch), batch.labels_N, head_of(self.model), dtype=self.precision.compute)

        return self.within(work)

    def _hidden(self, batch: LaidDocuments) -> Tensor:
        """[N, D], the states that predict the targets."""
        laid = Laid(batch.tokens_T, batch.positions_T, batch.rows_N, 0)
        if self.backend == "blocks" and laid.tokens_C.device.type == "cpu" and not draws_lots(self.model):
            laid = lay_once(batch.tokens_T, batch.positions_T, batch.rows_N, batch.lengths)
        documents = plan_documents(batch.lengths, device=batch.tokens_T.device, shared=laid.shared)
        hidden_CD = hidden_states(
            self.model,
            laid.tokens_C,
            laid.positions_C,
            documents,
            precision=self.precision,
            backend=self.backend,
            kernels=self.kernels,
        )
        return hidden_CD.index_select(0, laid.rows_N)


def hidden_states(
    model: PreTrainedModel,
    tokens_T: Tensor,
    positions_T: Tensor,
    documents: Documents,
    *,
    precision: Precision,
    backend: str,
    kernels: Kernels | None = None,
) -> Tensor:
    """The decoder's last hidden states [T, D], products in the types of `precision`."""
    with torch.autocast(tokens_T.device.type, precision.compute, enabled=precision.autocast):
        return last_hidden(model, tokens_T, positions_T, documents, backend=backend, kernels=kernels)
