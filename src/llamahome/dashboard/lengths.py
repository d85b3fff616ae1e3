"""How long the rows of a run are and what share of them is learned, from rows taken evenly from its data."""

from dataclasses import dataclass

import numpy as np

from llamahome.config.schema import DataConfig
from llamahome.data.checks.stats import histogram
from llamahome.data.files.sources import Source
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.data.view import sizes

MOST_ROWS = 1000
MOST_TOKENS = 1_000_000
"""Read before the page is shown: about a second. Rows of a book each reach it before MOST_ROWS."""
_AT_ONCE = 50


@dataclass(frozen=True)
class Bar:
    """The rows of at least `begin` and at most `last` tokens."""

    begin: int
    last: int
    rows: int
    longer: int
    """Those of them that are longer than data.max_length."""


@dataclass(frozen=True)
class Lengths:
    """Counts over the rows that were read; lengths are those before max_length is applied."""

    read: int
    usable: int
    tokens: int
    learned_share: float
    """Of the tokens that are trained on, 0 to 1."""
    max_length: int
    bars: tuple[Bar, ...]

    @property
    def mean(self) -> float:
        """Tokens of a usable row."""
        return self.tokens / max(1, self.usable)

    @property
    def longer(self) -> int:
        """Rows longer than max_length."""
        return sum(bar.longer for bar in self.bars)

    @property
    def most(self) -> int:
        """Rows of the highest bar."""
        return max((bar.rows for bar in self.bars), default=0)

    @property
    def marked(self) -> int:
        """The number of bars that begin at or below max_length; its mark is drawn after them."""
        return sum(bar.begin <= self.max_length for bar in self.bars)


def lengths_of(
    source: Source, data: DataConfig, tokenizer: ChatTokenizer, *, learned: bool = True, most_tokens: int = MOST_TOKENS
) -> Lengths:
    """Tokenize at most MOST_ROWS rows, fewer where they are long; `learned` is whether their answers are."""
    chosen = np.linspace(0, len(source) - 1, min(MOST_ROWS, len(source))).round().astype(int)
    chosen = np.random.default_rng(0).permutation(chosen)  # so that it stays even where it ends early
    read, lengths, tokens, trained, targets = 0, [], 0, 0, 0
    for begin in range(0, len(chosen), _AT_ONCE):
        numbers = sorted(chosen[begin : begin + _AT_ONCE].tolist())
        for size in sizes(source, numbers, data, tokenizer, learned=learned):
            lengths.append(size.needed)
            tokens, trained, targets = tokens + size.tokens, trained + size.trained, targets + size.learned
        read += len(numbers)
        if tokens >= most_tokens:
            break
    found = np.array(lengths, np.int64)
    bars = []
    for each in histogram(found):
        inside = found[(found >= each.begin) & (found < each.end)]
        bars.append(Bar(each.begin, each.end - 1, each.rows, int((inside > data.max_length).sum())))
    return Lengths(read, len(lengths), tokens, targets / max(1, trained), data.max_length, tuple(bars))
