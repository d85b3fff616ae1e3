"""What is wrong with rows beside the others: the same again, far too long, in another language, or in the evaluation data."""

import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from llamahome.config.schema import DataConfig
from llamahome.data.checks.duplicates import answers, exchanged, in_common, near_across, near_repeats, repeats, said, same_letters
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
from llamahome.units import many

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
    """Duplicates, with `near` near duplicates, wildly long rows and rare languages among the rows of one side."""
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
    yield from _cut(side)


def shared(main: Side, evaluation: Side) -> Iterator[Found]:
    """Rows to train on that are in the evaluation data too."""
    where = np.flatnonzero(evaluation.facts.usable)
    hashes, first = np.unique(evaluation.facts.hashes[where], return_index=True)
    for number in np.flatnonzero(main.facts.usable & np.isin(main.facts.hashes, hashes)).tolist():
        other = int(where[first[np.searchsorted(hashes, main.facts.hashes[number])]])
        message = f"stands in the evaluation data too, {evaluation.place(other).where}: what is measured there was learned by heart"
        yield _warn(main, number, "data.shared-with-eval", message, "remove it from one of the two")


def nearly_shared(main: Side, evaluation: Side) -> Iterator[Found]:
    """Rows to train on that are nearly the same as rows of the evaluation data; equal ones are left to `shared`."""
    if not (main.facts.signatures.shape[1] and evaluation.facts.signatures.shape[1]):
        return
    equal = np.isin(main.facts.hashes, evaluation.facts.hashes[evaluation.facts.usable])
    own = np.flatnonzero(main.facts.usable & ~equal)
    read, other = _reader(main), _reader(evaluation)
    pairs = near_across(
        main.facts.signatures[own], evaluation.facts.signatures, lambda at, theirs: in_common(read(int(own[at])), other(theirs))
    )
    for at, theirs, share in pairs:
        message = (
            f"{share:.0%} of its stretches of five words are in the evaluation data too, {evaluation.place(theirs).where}: "
            "what is measured there was nearly learned by heart"
        )
        yield _warn(main, int(own[at]), "data.near-shared-with-eval", message, "remove one of the two, unless both are meant")


def nearly_held_out(main: Side, held: NDArray[np.bool_]) -> Iterator[Found]:
    """One warning, with their number and an example, of rows to train on that are nearly the same as rows held out of the same files."""
    if not (main.facts.signatures.shape[1] and held.any()):
        return
    own, theirs = np.flatnonzero(main.facts.usable & ~held), np.flatnonzero(main.facts.usable & held)
    read, signatures = _reader(main), main.facts.signatures
    pairs = near_across(signatures[own], signatures[theirs], lambda at, to: in_common(read(int(own[at])), read(int(theirs[to]))))
    first, count = None, 0
    for pair in pairs:
        first, count = first or pair, count + 1
    if first is not None:
        one, other = main.place(int(own[first[0]])).where, main.place(int(theirs[first[1]])).where
        message = (
            f"{many(count, 'row')} to train on {'is' if count == 1 else 'are'} nearly the same as rows held out for evaluation, "
            f"for example {one} and {other} "
            f"({first[2]:.0%} of the stretches of five words in common): what is measured there was nearly learned by heart"
        )
        hint = "remove one of each two, or set data.eval_path to rows of other origin"
        yield Found("warning", Problem(code="data.near-shared-with-eval", message=message, where=main.source.paths[0], hint=hint))


def _reader(side: Side) -> Callable[[int], str]:
    return lru_cache(maxsize=1024)(lambda number: exchanged(side.conversation(number)))


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


def _cut(side: Side) -> Iterator[Found]:
    """Long answers that end without a mark, where nearly all long answers have one."""
    closed, opened = int((side.facts.endings == 1).sum()), np.flatnonzero(side.facts.endings == 2)
    if closed + len(opened) < _LEAST or closed < _SHARE * (closed + len(opened)):
        return
    for number in opened.tolist():
        end = " ".join(answers(side.conversation(number)).split()[-3:])
        message = (
            f"the answer may be cut: it ends in {end[-40:]!r}, where {closed:,} of {closed + len(opened):,} long answers end in a mark"
        )
        yield _warn(side, number, "data.cut-answer", message, "read the original again, or remove the row")


def _warn(side: Side, number: int, code: str, message: str, hint: str, *, text: str | None = None) -> Found:
    place = side.place(number)
    shown = excerpt(said(side.conversation(number)) if text is None else text, place.line)
    return Found("warning", Problem(code=code, message=message, where=place.where, excerpt=shown, hint=hint), place)
