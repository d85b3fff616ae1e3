"""What is wrong with rows beside the others: the same again, far too long, in another language, or in the evaluation data."""

import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from llamahome.config.schema import DataConfig
from llamahome.data.checks.duplicates import exchanged, in_common, near_repeats, repeats, said, same_letters
from llamahome.data.checks.facts import Facts
from llamahome.data.checks.findings import Found, Place
from llamahome.data.checks.languages import rare_languages
from llamahome.data.checks.losses import Losses
from llamahome.data.checks.rowcheck import format_of
from llamahome.data.files.jsonrow import excerpt
from llamahome.data.files.sources import Source
from llamahome.data.overlap import overlaps_apart
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.formats import understand
from llamahome.errors import Problem

_FAR, _SHARE, _LEAST = 10, 0.95, 100
"""A row is wildly long when it is 10 times as long as 95 % of the rows, where there are at least 100."""


@dataclass(frozen=True)
class Side:
    """The rows to train on, or those to evaluate on, looked at."""

    source: Source
    data: DataConfig
    format: str | None
    """None when there is no one format."""
    facts: Facts
    losses: Losses
    tokens: bool
    """Whether tokens were counted."""
    mendable: int = 0
    """Rows that are refused as they are and could be mended."""
    reason: str = ""
    """Why they are believed to be in this format."""
    notes: tuple[str, ...] = ()
    """What should be known of how rows are written and end."""

    def place(self, number: int) -> Place:
        """Where row `number`, counted over all files, is."""
        return self.facts.place(number, self.source.paths)

    def conversation(self, number: int) -> Conversation:
        """A usable row, read again."""
        row = self.source.parsed(number)
        assert isinstance(row, Row)
        found = understand(row, self.format or format_of(row, self.data) or "", self.data.columns)
        assert isinstance(found, Conversation)
        return found


def compared(side: Side, *, near: bool = True) -> Iterator[Found]:
    """Duplicates, near duplicates unless `near` is off, wildly long rows and rare languages among the rows of one side."""
    again = repeats(side.facts.hashes, side.facts.usable)
    for number, first in again:
        one = side.conversation(number)
        but = "" if same_letters(one, side.conversation(first)) else " but for white space"
        message = f"says the same as {side.place(first).where}{but}, so it is learned once more in every epoch"
        yield _warn(side, number, "data.duplicate", message, "--fix OUT leaves it out", text=said(one))
    if near and side.facts.signatures.shape[1]:
        texts = lru_cache(maxsize=1024)(lambda number: exchanged(side.conversation(number)))
        repeated = {number for number, _ in again}
        for number, first, share in near_repeats(side.facts.signatures, repeated, lambda one, other: in_common(texts(one), texts(other))):
            message = f"{share:.0%} of its stretches of five words are in {side.place(first).where} too"
            yield _warn(side, number, "data.near-duplicate", message, "remove one of the two, unless both are meant")
    yield from _far_too_long(side)
    yield from _foreign(side)


def shared(main: Side, evaluation: Side) -> Iterator[Found]:
    """Rows to train on that are in the evaluation data too."""
    where = np.flatnonzero(evaluation.facts.usable)
    hashes, first = np.unique(evaluation.facts.hashes[where], return_index=True)
    for number in np.flatnonzero(main.facts.usable & np.isin(main.facts.hashes, hashes)).tolist():
        other = int(where[first[np.searchsorted(hashes, main.facts.hashes[number])]])
        message = f"stands in the evaluation data too, {evaluation.place(other).where}: what is measured there was learned by heart"
        yield _warn(main, number, "data.shared-with-eval", message, "remove it from one of the two")
    yield from _nearly_shared(main, evaluation, set(np.flatnonzero(np.isin(main.facts.hashes, hashes)).tolist()))


def _nearly_shared(main: Side, evaluation: Side, equal: set[int]) -> Iterator[Found]:
    """Rows to train on that are nearly the same as one of the evaluation data; those in `equal` are told already."""
    if not main.facts.signatures.shape[1] or not evaluation.facts.signatures.shape[1]:
        return
    before = len(evaluation.facts)

    @lru_cache(maxsize=1024)
    def text(number: int) -> str:
        return exchanged(evaluation.conversation(number) if number < before else main.conversation(number - before))

    signatures = np.concatenate([evaluation.facts.signatures, main.facts.signatures])
    skipped = {before + number for number in equal}
    for number, other, share in near_repeats(signatures, skipped, lambda one, two: in_common(text(one), text(two)), known=before):
        message = f"{share:.0%} of its stretches of five words are in the evaluation data too, {evaluation.place(other).where}"
        yield _warn(main, number - before, "data.near-eval", message, "remove one of the two, unless both are meant")


def shared_apart(main: Side) -> Iterator[Found]:
    """Rows to train on that are in splits that are left alone, which may be meant to measure on."""
    for name, told in overlaps_apart(main.source, main.source.hashes()):
        message = f"{told}: what is measured there was learned by heart" if "for example" in told else told
        problem = Problem(code="data.shared-with-split", message=message, where=main.source.paths[0], hint=f"remove them from {name}")
        yield Found("warning", problem if "for example" in told else replace(problem, hint=None))


def _far_too_long(side: Side) -> Iterator[Found]:
    lengths, unit = (side.facts.tokens, "tokens") if side.tokens else (side.facts.characters, "characters")
    some = lengths[side.facts.usable]
    if len(some) < _LEAST:
        return
    usual = max(1, int(np.quantile(some, _SHARE)))
    for number in np.flatnonzero(side.facts.usable & (lengths > _FAR * usual)).tolist():
        message = f"{lengths[number]:,} {unit}, where {_SHARE:.0%} of the rows have at most {usual:,}"
        hint = f"llamahome data show {shlex.quote(side.source.paths[int(side.facts.files[number])])} --longest"
        yield _warn(side, number, "data.far-too-long", message, hint)


def _foreign(side: Side) -> Iterator[Found]:
    languages = side.facts.languages.tolist()
    usual, rare = rare_languages(languages)
    counts = Counter(languages)
    for number, language in enumerate(languages):
        if language in rare:
            message = f"the answer seems to be in {language}, as in {counts[language]:,} of {len(languages):,} rows; most are in {usual}"
            yield _warn(side, number, "data.rare-language", message, "remove it, unless it is meant")


def _warn(side: Side, number: int, code: str, message: str, hint: str, *, text: str | None = None) -> Found:
    place = side.place(number)
    shown = excerpt(said(side.conversation(number)) if text is None else text, place.line)
    return Found("warning", Problem(code=code, message=message, where=place.where, excerpt=shown, hint=hint), place)
