"""The values that data/ passes on: Row, Conversation, Example, Microbatch.

Legend: T tokens of a micro-batch, D documents in it, N targets in it. This module does not import torch, so that commands that only look at
data start quickly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Role = Literal["system", "user", "assistant", "tool"]


def place_of(path: str, line: int, row: int = 0) -> str:
    """`path:line`; in a Parquet or Arrow file, which has no lines, `path:row 17`; `path:1 (row 17)` if lines hold several rows.

    `row` is counted from 0, what is shown from 1.
    """
    name = path.lower().removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".parquet", ".arrow")):
        return f"{path}:row {line}"
    return f"{path}:{line}" if row < line else f"{path}:{line} (row {row + 1})"


@dataclass(frozen=True)
class Row:
    """One record of a source, as it is there."""

    index: int
    """Zero-based number within its source file."""
    source: str
    """Path of the file."""
    line: int
    """One-based line in the file, or one-based number of the row if the file has no lines."""
    value: dict[str, Any]
    not_text: tuple[str, ...] = ()
    """Columns with bytes that are not UTF-8 text, which are null in `value`."""

    @property
    def where(self) -> str:
        """`path:line`, as errors name it."""
        return place_of(self.source, self.line, self.index)


@dataclass(frozen=True)
class Conversation:
    """A row understood: turns of a chat, or plain text (then `turns` is empty)."""

    row: Row
    turns: tuple[dict[str, Any], ...] = ()
    """Each with "role" (Role) and "content" (str), ready for a chat template. A turn with "tool_calls" may have no content; a tool's
    turn may have "name" and "tool_call_id"."""
    text: str | None = None
    context_only: frozenset[int] = frozenset()
    """Numbers of assistant turns that are never learned: those of the prompt of prompt_completion, and those of weight 0."""
    tools: tuple[dict[str, Any], ...] = ()
    """Definitions of the tools that the assistant may call, for the chat template."""
    other: tuple[dict[str, Any], ...] = ()
    """The turns with the worse answer, if the row is a pair of answers of which `turns` has the better one."""
    good: bool = True
    """Whether the answer is good; only a labelled row may have a bad one."""


@dataclass(frozen=True)
class Example:
    """A conversation in tokens. Arrays have one element per token."""

    source: str
    row: int
    line: int
    tokens: NDArray[np.int32]
    targets: NDArray[np.bool_]
    """Which tokens are learned; the first token of an example never is, because nothing predicts it."""
    cut: int = 0
    """Tokens beyond max_length that are not in `tokens`."""
    cut_targets: int = 0
    """How many of those would have been learned."""
    known: float | None = None
    """What is known of it before training, such as its log-probability in the reference model."""
    good: bool = True
    """Whether the answer is good; only a labelled row may have a bad one."""


@dataclass(frozen=True)
class Together:
    """Documents of one row that is learned as a whole, like the two answers of a pair."""

    documents: int
    shared: int = 0
    """Tokens that all of them begin with, to be computed once; 0 if each is computed in full."""


@dataclass(frozen=True)
class Microbatch:
    """Documents laid end to end without padding: one forward and backward pass on one rank."""

    tokens_T: torch.Tensor
    """int64 [T]."""
    positions_T: torch.Tensor
    """int64 [T], starting from 0 in each document."""
    lengths: tuple[int, ...]
    """Tokens of each document, D numbers that add up to T; host side, so that attention needs no device read."""
    rows_N: torch.Tensor
    """int64 [N], increasing: positions whose hidden state predicts a target, i.e. target position - 1."""
    labels_N: torch.Tensor
    """int64 [N]: the token that each of them must predict."""
    targets: tuple[int, ...] = ()
    """Targets of each document, D numbers that add up to N; host side."""
    groups: tuple[Together, ...] = ()
    """The documents of each row, if a row is learned as a whole; they lie one after the other. Else empty."""
    known_D: torch.Tensor | None = None
    """float32 [D], on the processor: what is known of each document before training, such as its log-probability in the reference model."""
    good: tuple[bool, ...] = ()
    """Whether the answer of each document is good; host side."""
    keys: tuple[int, ...] = field(default=())
    """Positions of the documents in the data order; they name the rows if a step fails."""
    index: int = 0
    """Number of this micro-batch in its step over all ranks; seeds its dropout."""
    idle: bool = False
    """A pass that other ranks need this rank to take part in: it holds no row and learns nothing."""
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What an objective needs beside the labels, by its name: [N, ...] or [D, ...]; back ends take it to the device."""
    documents: object | None = None
    """Document boundaries in the form that the back end's attention reads; set by the back end that moved the tensors to the device."""

    @property
    def num_tokens(self) -> int:
        """T, or 0 when idle."""
        return 0 if self.idle else sum(self.lengths)

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Tokens of what cannot be divided: of each group, or of each document."""
        ends = np.cumsum((0, *self.lengths))
        borders = np.cumsum((0, *([group.documents for group in self.groups] or (1,) * len(self.lengths))))
        return tuple(np.diff(ends[borders]).tolist())

    @property
    def num_targets(self) -> int:
        """N."""
        return int(self.labels_N.numel())
