"""The interface of a back end: everything of a training pass that differs by device. Who implements it: reference, cuda, cpu.

A run has one back end, chosen once (choose.py). The rest of the program asks it and never asks which device there is.

Legend: T tokens, N targets, D hidden size, H query heads, K key heads, E head size (that of v may differ).
"""

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamahome.config.schema import Config
from llamahome.model.backends.documents import Documents
from llamahome.model.backends.loss import Head, HeadStats
from llamahome.model.precision import Precision


@dataclass(frozen=True)
class Scoring:
    """What an attention layer does with its scores."""

    scale: float
    window: int | None = None
    """How many tokens back a token may look, itself included."""
    softcap: float | None = None
    """Scores are squashed to softcap * tanh(score / softcap) (Gemma 2)."""
    dropout: float = 0.0


class Attend(Protocol):
    """Causal attention inside documents."""

    def __call__(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, scoring: Scoring, /) -> Tensor:
        """[T, H, E of v]; no token sees another document."""


class Batch(Protocol):
    """A micro-batch: documents end to end, as data/records.py's Microbatch holds them."""

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
    @property
    def documents(self) -> object | None: ...  # noqa: D102


B = TypeVar("B", bound=Batch)


@dataclass(frozen=True)
class Pass:
    """The tokens that a forward pass computes, on the device."""

    tokens_T: Tensor
    positions_T: Tensor
    rows_N: Tensor
    """Places of the states that predict the targets; one may stand there for several documents."""
    documents: Documents


class Backend(Protocol):
    """Everything that differs by device."""

    name: str
    device: torch.device
    precision: Precision
    micro_batch_tokens: int
    """Tokens of a pass when nobody says."""
    fewest_tokens: int
    """To which passes shrink, when nobody says, before activations are recomputed."""
    compiles: bool
    """Whether it has anything to compile, on some machine."""
    compile_costs: str
    """What compiling takes during the run, for people; empty where it is done before the first step."""
    memory_gbps: float
    """About how fast memory is read and written, 10^9 bytes a second; for the time of an update in a plan."""
    pass_tokens_per_answer_token: float
    """Tokens of a forward pass in the time in which all sample answers get one token longer; for the share that evaluating takes."""

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, scoring: Scoring, /) -> Tensor:
        """Causal attention inside each document, [T, H, E of v]."""

    def deliver(self, batch: B, /) -> B:
        """`batch` on the device; called on the loader's thread, ahead of the step."""

    def lay(self, batch: Batch, model: PreTrainedModel, /) -> Pass:
        """What `model` computes of a delivered batch."""

    def loss_sum(self, hidden_ND: Tensor, labels_N: Tensor, head: Head) -> Tensor:
        """() float32: sum over targets of -log p(label); differentiable in hidden states and in a trained head."""

    def stats(self, hidden_ND: Tensor, labels_N: Tensor, head: Head) -> HeadStats:
        """Summed loss and number of targets ranked first, without gradients."""

    def wins_back(self, tokens: float, *, weights: int, processes: int) -> bool:
        """Whether passes over `tokens` by all processes win back the time of compiling what this process would have to compile."""

    def cannot_compile(self) -> str | None:
        """Why nothing is compiled here, or None when all is ready to be; may compile what does not depend on a model."""

    def compile(self, model: PreTrainedModel) -> int:
        """Let parts of `model` run compiled, after adapters have been added; returns how many. Only after `cannot_compile` gave None."""

    def kept_bytes(self, config: Config, model: PreTrainedModel, tokens: int, *, longest: int, compiled: bool) -> int:
        """Estimated memory that a forward pass over `tokens` in documents of up to `longest` keeps for the backward pass."""

    def tile_bytes(self, vocabulary: int) -> int:
        """Memory of the loss head's tile of logits and of what is made of it."""

    def remarks(self, model: PreTrainedModel) -> list[str]:
        """Lines that tell what of `model` is computed in a slower way, what is used instead, and why."""

    def mark(self) -> object:
        """The moment at which the device has done what was asked of it so far; nobody waits for it."""

    def seconds_between(self, earlier: Any, later: Any) -> float:
        """From one mark to a later one; waits until the device has come there."""

    def free_bytes(self, local_size: int) -> int | None:
        """Memory of the device that this process may fill; None where the device uses the machine's memory."""
