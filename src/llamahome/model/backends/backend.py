"""The interface of a back end: the parts of a training pass that differ by device; implemented by reference, cuda and cpu.

choose.py selects one back end per run. All other code calls the back end and never asks for the type of the device.

Legend: T tokens, N targets, D hidden size, H query heads, K key heads, E head size (that of v may differ).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamahome.config.schema import Config
from llamahome.model.backends.loss import Head, HeadStats
from llamahome.model.backends.token_losses import TokenLoss
from llamahome.model.precision import Precision

TILE_TOKENS = 2048
"""Tokens of a tile of a feed-forward block: as many as the largest usual pass has, so that products are as fast."""


@dataclass(frozen=True)
class Group:
    """Documents that begin with the same tokens, such as two answers to one prompt."""

    lengths: tuple[int, ...]
    """Tokens of each document, the shared ones included."""
    shared: int
    """Number of shared tokens; less than the length of the shortest document."""

    @property
    def tokens(self) -> int:
        """Tokens of the group in a pass: the shared ones once, then the own ones of each document."""
        return sum(self.lengths) - self.shared * (len(self.lengths) - 1)


@dataclass(frozen=True, eq=False)
class Documents:
    """The document boundaries of a pass, made once per pass and used by every layer.

    If all documents begin with the same `shared` tokens, the pass holds these tokens once, followed by the own tokens of each document.
    """

    lengths: tuple[int, ...]
    """Tokens of each document, the shared ones included."""
    shared: int = 0
    """Number of shared tokens; less than the length of the shortest document."""
    groups: tuple[Group, ...] = ()
    """If documents share tokens with some others only: every document in its group, in order. The pass then holds one group after the
    other, and `shared` is 0."""
    starts: Tensor | None = None
    """int32 [documents + 1] on the device: the first token of each document, and the number of tokens. None if the back end does not use
    it."""


@dataclass(frozen=True)
class Scoring:
    """How an attention layer computes its scores."""

    scale: float
    window: int | None = None
    """Number of tokens that a query sees, itself included; None for all before it."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap) (Gemma 2)."""
    dropout: float = 0.0


class Attend(Protocol):
    """Causal attention inside documents."""

    def __call__(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, scoring: Scoring, /) -> Tensor:
        """[T, H, E of v]; no token sees another document."""


class Together(Protocol):
    """Documents of a batch that belong together, and the number of tokens that all of them begin with, which are computed once."""

    @property
    def documents(self) -> int: ...  # noqa: D102
    @property
    def shared(self) -> int: ...  # noqa: D102


class Batch(Protocol):
    """A micro-batch of concatenated documents, such as the Microbatch of data/records.py."""

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
    def groups(self) -> Sequence[Together]: ...  # noqa: D102
    @property
    def extra(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def documents(self) -> object | None: ...  # noqa: D102


B = TypeVar("B", bound=Batch)


@dataclass(frozen=True)
class Pass:
    """The tokens that a forward pass computes, on the device."""

    tokens_T: Tensor
    positions_T: Tensor
    rows_N: Tensor
    """Index of the state that predicts each target; several documents may use the same state of a shared token."""
    documents: Documents


class Offloaded(Protocol):
    """A tensor that was copied out of the device's memory."""

    def fetch(self) -> None:
        """Begin to copy it back."""

    def load(self) -> Tensor:
        """It, on the device again; a second call copies it again."""


class OffloadStore(Protocol):
    """Where tensors can wait outside of the device's memory."""

    @property
    def place(self) -> str:
        """In words."""

    def free_bytes(self) -> int | None:
        """Bytes that all processes of this machine together may store; None for those of the machine's memory."""

    def store(self, x: Tensor, /) -> Offloaded:
        """Begin to copy `x`; its memory is free when nobody else holds it, at the latest once the next tensor has been stored."""


class Backend(Protocol):
    """The parts of a training pass that differ by device."""

    name: str
    device: torch.device
    precision: Precision
    micro_batch_tokens: int
    """Default number of tokens of a pass."""
    min_micro_batch_tokens: int
    """Automatic sizing shrinks passes down to this number of tokens before it recomputes activations."""
    compiles: bool
    """Whether this back end compiles anything on any machine."""
    compile_note: str
    """What the user should know about the cost or the result of compiling; empty if there is nothing to tell."""
    memory_gbps: float
    """Approximate memory bandwidth in 10^9 bytes a second, from which a plan estimates the time of an update."""
    pass_tokens_per_answer_token: float
    """Tokens of a forward pass that take as long as generating one token of all sample answers; used to plan the time of evaluations."""

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, scoring: Scoring, /) -> Tensor:
        """Causal attention inside each document, [T, H, E of v]."""

    def to_device(self, batch: B, /) -> B:
        """`batch` on the device; the loader's thread calls it ahead of the step."""

    def shares_prefixes(self, model: PreTrainedModel, /) -> bool:
        """Whether `make_pass` can compute tokens that documents of a batch share only once, while `model` is trained."""

    def make_pass(self, batch: Batch, model: PreTrainedModel, /) -> Pass:
        """The pass that `model` computes for a batch on the device."""

    def loss_sum(self, hidden_ND: Tensor, labels_N: Tensor, head: Head) -> Tensor:
        """() float32: sum over targets of -log p(label); differentiable in hidden states and in a trained head."""

    def logprobs(self, hidden_ND: Tensor, labels_N: Tensor, head: Head) -> Tensor:
        """[N] float32: log p(label) of each target; differentiable in hidden states and in a trained head."""

    def token_loss_sum(self, hidden_ND: Tensor, head: Head, loss: TokenLoss) -> Tensor:
        """() float32: sum over targets of another loss than -log p(label); differentiable in hidden states and in a trained head."""

    def stats(self, hidden_ND: Tensor, labels_N: Tensor, head: Head) -> HeadStats:
        """Summed loss and number of targets ranked first, without gradients."""

    def compile_pays_off(self, tokens: float, *, weights: int, processes: int) -> bool:
        """Whether compiling saves more time than it takes, if all processes together train on `tokens`."""

    def cannot_compile(self) -> str | None:
        """The reason why nothing can be compiled here, or None. May compile everything that does not depend on a model."""

    def compile(self, model: PreTrainedModel) -> int:
        """Compile parts of `model` and return their number. Call it after adapters were added and `cannot_compile` returned None."""

    def kept_bytes(self, config: Config, model: PreTrainedModel, tokens: int, *, longest: int, compiled: bool) -> int:
        """Estimated memory that a forward pass over `tokens` in documents of up to `longest` keeps for the backward pass."""

    def recomputed_bytes(self, config: Config, model: PreTrainedModel, tokens: int, *, longest: int, compiled: bool) -> int:
        """The same where activations are recomputed: the input of each layer, and one layer with its gradients."""

    def tile_tokens(self, compiled: bool) -> int | None:
        """Tokens of a feed-forward block that are computed at once where activations are recomputed; None for all."""

    def tile_bytes(self, vocabulary: int) -> int:
        """Memory of the loss head's tile of logits and of the values computed from it."""

    def performance_notes(self, model: PreTrainedModel) -> list[str]:
        """Messages about parts of `model` that run on a slower path, with the reason and the path."""

    def timestamp(self) -> object:
        """The time at which the device finishes all work queued so far; does not wait for it."""

    def seconds_between(self, earlier: Any, later: Any) -> float:
        """Seconds between two timestamps; waits until the device has reached the later one."""

    def snapshot_out_of_memory(self, path: Path) -> bool:
        """From now on, write what the device's memory holds to `path` when an allocation fails for the first time; False if it cannot."""

    def free_bytes(self, local_size: int) -> int | None:
        """Device memory that this process may use; None if the device uses the machine's memory."""

    def offload_store(self) -> OffloadStore | str:
        """A new store for inputs of layers, or the reason why this device has none."""
