"""Whether a base is streamed (stream.py), and in what passes then: a pure choice by the time that a step takes.

A large pass reads the base for more tokens; a small one leaves more memory for layers that need not be read. Activations that are computed
again allow larger passes for a third more arithmetic. Of all sizes that fit, the fastest is taken.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llamahome.model.place import LARGEST_SHARE

_HELD_SHARE = 0.7
"""Share of the free memory up to which a base is held in it; the rest is for activations. As for replicated weights in place.py."""
_SHOWN = 0.25
"""Share of the time of reading that a step takes longer although it reads while it computes: faults, and the work of the system."""
_AGAIN = 4 / 3
"""Arithmetic with activations that are computed again: a third pass beside the forward and the backward one."""
_ROOM_FOR_ERRORS = 1.2
"""Memory for activations, relative to their estimate, that is not given to layers; too little of it would only be read again."""
OTHER_FILES = 2**28
"""Memory for pages of other files: the code of the libraries, and checkpoints that are being written."""
_FEWEST_TOKENS = 256
_LARGER_STEP = 1.2
"""Steps differ in tokens; most have no more than this, relative to the mean."""


def must_stream(base_bytes: int, *, free_bytes: int) -> bool:
    """Whether a frozen base of so many bytes is too large to be held beside the activations of a pass."""
    return base_bytes > _HELD_SHARE * free_bytes


@dataclass(frozen=True)
class Rates:
    """How fast this machine is, as measured."""

    seconds_per_byte: float
    """Of reading the base."""
    seconds_per_token: float
    """Of a forward and a backward pass."""


@dataclass(frozen=True)
class StreamedBase:
    """The sizes of a base that is streamed, and the memory for it."""

    nbytes: int
    """Of the parts that are read."""
    room_bytes: int
    """For the parts that are in memory while a pass uses them."""
    kept_with: Callable[[int], int]
    """Bytes of whole layers that stay in memory, if there is so much room for them."""
    free_bytes: int
    """For the base and the activations: what is free, less the adapters, their optimizer and the loss head."""
    needs: Callable[[int, bool], int]
    """Bytes of activations of a pass of some tokens, also if they are computed again."""


@dataclass(frozen=True)
class Passes:
    """The passes of a step, and what they read."""

    tokens: int
    """Most tokens of a pass."""
    recomputes: bool
    keep_bytes: int
    """Memory for layers that are not read again."""
    read_bytes: int
    """Of a forward pass; a backward pass reads as much."""
    per_step: int
    """Passes of a step."""
    seconds: float
    """Of a step, which reads ahead while it computes."""
    fits: bool


def choose_passes(
    base: StreamedBase, rates: Rates, *, step_tokens: float, longest: int, tokens: int | None, recomputes: bool | None
) -> Passes:
    """The fastest passes of those that fit, for steps of `step_tokens` in rows of up to `longest`.

    `tokens` and `recomputes` are what the user has set. If nothing fits, the smallest pass.
    """
    sizes = [tokens] if tokens is not None else list(_sizes(step_tokens, longest))
    again = [recomputes] if recomputes is not None else [False, True]
    choices = [_passes(base, rates, size, choice, step_tokens=step_tokens, longest=longest) for size in sizes for choice in again]
    fitting = [choice for choice in choices if choice.fits]
    if not fitting:
        return choices[-1]
    return min(fitting, key=lambda choice: (choice.seconds, choice.per_step, choice.recomputes))


def _sizes(step_tokens: float, longest: int) -> Iterator[int]:
    """A step in one pass, in two, in four, as far as the longest row and the least sensible pass allow."""
    size = max(longest, _FEWEST_TOKENS, round(_LARGER_STEP * step_tokens))
    while size >= max(longest, _FEWEST_TOKENS):
        yield size
        size //= 2


def _passes(base: StreamedBase, rates: Rates, tokens: int, recomputes: bool, *, step_tokens: float, longest: int) -> Passes:
    usable, needed = base.free_bytes - base.room_bytes, base.needs(max(tokens, longest), recomputes)
    keep = max(0, usable - round(_ROOM_FOR_ERRORS * needed) - OTHER_FILES)
    read, per_step = base.nbytes - base.kept_with(keep), max(1, -round(-step_tokens // tokens))
    computing = step_tokens * rates.seconds_per_token * (_AGAIN if recomputes else 1.0)
    reading = 2 * per_step * read * rates.seconds_per_byte
    return Passes(tokens, recomputes, keep, read, per_step, max(computing, reading) + _SHOWN * reading, needed <= LARGEST_SHARE * usable)
