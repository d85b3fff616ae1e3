"""Where the documents of a pass begin and end, made once per pass and used by every layer."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents end to end.

    Where all of them begin with the same `shared` tokens, these lie once before everything else, then what each document has of its own.
    """

    lengths: tuple[int, ...]
    """Tokens of each whole document."""
    shared: int = 0
    """Fewer than the shortest document has."""
    starts: Tensor | None = None
    """int32 [documents + 1] on the device: where each begins, and where the last one ends; only for a back end that reads it there."""
