"""What is wrong with a row compared with the others: duplicates, outliers in length or language, rows of the evaluation data."""

import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from llamahome.config.schema import DataConfig
from llamahome.data.checks.answer_quality import rare_languages
from llamahome.data.checks.duplicates import (
    all_text,
    answer_text,
    dialogue_text,
    in_common,
    near_across,
    near_repeats,
    repeats,
    same_letters,
)
from llamahome.data.checks.findings import Found, RowLocation
from llamahome.data.checks.row_sizes import RowSizes
from llamahome.data.checks.rowcheck import format_of
from llamahome.data.files.jsonrow import excerpt
from llamahome.data.files.sources import Source
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.formats import understand
from llamahome.data.split_overlap import overlaps_apart
from llamahome.data.store.truncation import Truncation
from llamahome.errors import Problem
from llamahome.units import many

_LONG_FACTOR, _LONG_SHARE, _MIN_ROWS = 10, 0.95, 100
"""A row is far too long if it is 10 times as long as 95 % of the rows; at least 100 rows are needed to tell."""

_CLOSED_SHARE = 0.98
"""Long answers without a mark at the end are reported if this share has one; of the sample rows 96 % have, and none is cut."""
_MIN_REPEATED, _MIN_ANSWER, _MIN_LIMIT, _MIN_TOKENS = 10, 40, 200, 48
"""So many rows (or a hundredth of all) with one answer are reported. Characters above which an answer is not a label, and characters and
tokens above which all answers may have been cut at one length."""
_SLACK = 2
"""A word that was cut may have this many tokens more or fewer than where the answer was cut."""


@dataclass(frozen=True)
class Side:
    """The checked rows to train on, or those to evaluate on."""

    source: Source
    data: DataConfig
    format: str | None
    """None if the rows have no common format."""
    facts: RowSizes
    losses: Truncation
    tokens: bool
    """Whether the rows were tokenized."""
    repairable: int = 0
    """Refused rows that can be repaired."""
    reason: str = ""
    """Why the rows are taken to be in this format."""
    notes: tuple[str, ...] = ()
    """What the user should know about how the chat template writes and ends rows."""

    def place(self, number: int) -> RowLocation:
        """The location of row `number`, counted over all files."""
        return self.facts.place(number, self.source.paths)

    def conversation(self, number: int) -> Conversation:
        """A usable row, read again from its file."""
        row = self.source.parsed(number)
        assert isinstance(row, Row)
        conversation = understand(row, self.format or format_of(row, self.data) or "", self.data.columns)
        assert isinstance(conversation, Conversation)
        return conversation


def compare_rows(side: Side, *, near: bool = True) -> Iterator[Found]:
    """Compare the rows of one side: duplicates, with `near` near duplicates, outliers in length, language and answers."""
    duplicates = repeats(side.facts.hashes, side.facts.usable)
    for number, first in duplicates:
        conversation = side.conversation(number)
        but = "" if same_letters(conversation, side.conversation(first)) else " but for white space"
        message = f"says the same as {side.place(first).where}{but}, so it is learned once more in every epoch"
        yield _warn(side, number, "data.duplicate", message, "--fix OUT leaves it out", text=all_text(conversation))
    if near and side.facts.signatures.shape[1]:
        text_of = _cached_texts(side)
        equal = {number for number, _ in duplicates}
        for number, first, share in near_repeats(side.facts.signatures, equal, lambda row, other: in_common(text_of(row), text_of(other))):
            message = f"{share:.0%} of its runs of five words are in {side.place(first).where} too"
            yield _warn(side, number, "data.near-duplicate", message, "remove one of the two, unless both are meant")
    yield from _far_too_long(side)
    yield from _rare_language(side)
    yield from _open_ends(side)
    yield from _similar_answers(side)


def shared(main: Side, evaluation: Side) -> Iterator[Found]:
    """Rows to train on that are in the evaluation data too."""
    where = np.flatnonzero(evaluation.facts.usable)
    hashes, first = np.unique(evaluation.facts.hashes[where], return_index=True)
    for number in np.flatnonzero(main.facts.usable & np.isin(main.facts.hashes, hashes)).tolist():
        other = int(where[first[np.searchsorted(hashes, main.facts.hashes[number])]])
        message = f"is in the evaluation data too, {evaluation.place(other).where}: what is measured there was learned by heart"
        yield _warn(main, number, "data.shared-with-eval", message, "remove it from one of the two")


def nearly_shared(main: Side, evaluation: Side) -> Iterator[Found]:
    """Rows to train on that are nearly the same as rows of the evaluation data; `shared` reports equal ones."""
    if not (main.facts.signatures.shape[1] and evaluation.facts.signatures.shape[1]):
        return
    equal = np.isin(main.facts.hashes, evaluation.facts.hashes[evaluation.facts.usable])
    own = np.flatnonzero(main.facts.usable & ~equal)
    read, other = _cached_texts(main), _cached_texts(evaluation)
    pairs = near_across(
        main.facts.signatures[own], evaluation.facts.signatures, lambda at, theirs: in_common(read(int(own[at])), other(theirs))
    )
    for at, theirs, share in pairs:
        message = (
            f"{share:.0%} of its runs of five words are in the evaluation data too, {evaluation.place(theirs).where}: "
            "what is measured there was nearly learned by heart"
        )
        yield _warn(main, int(own[at]), "data.near-shared-with-eval", message, "remove one of the two, unless both are meant")


def nearly_held_out(main: Side, held: NDArray[np.bool_]) -> Iterator[Found]:
    """One warning if rows to train on are nearly the same as rows held out of the same files, with their number and an example."""
    if not (main.facts.signatures.shape[1] and held.any()):
        return
    own, theirs = np.flatnonzero(main.facts.usable & ~held), np.flatnonzero(main.facts.usable & held)
    read, signatures = _cached_texts(main), main.facts.signatures
    pairs = near_across(signatures[own], signatures[theirs], lambda at, to: in_common(read(int(own[at])), read(int(theirs[to]))))
    first, count = None, 0
    for pair in pairs:
        first, count = first or pair, count + 1
    if first is not None:
        one, other = main.place(int(own[first[0]])).where, main.place(int(theirs[first[1]])).where
        message = (
            f"{many(count, 'row')} to train on {'is' if count == 1 else 'are'} nearly the same as rows held out for evaluation, "
            f"for example {one} and {other} "
            f"({first[2]:.0%} of the runs of five words in common): what is measured there was nearly learned by heart"
        )
        hint = "remove one of each two, or set data.eval_path to rows of other origin"
        yield Found("warning", Problem(code="data.near-shared-with-eval", message=message, where=main.source.paths[0], hint=hint))


def _cached_texts(side: Side) -> Callable[[int], str]:
    return lru_cache(maxsize=1024)(lambda number: dialogue_text(side.conversation(number)))


def shared_with_splits(main: Side) -> Iterator[Found]:
    """Rows to train on that are also in splits that are not read, which may be meant for measuring."""
    for name, overlap in overlaps_apart(main.source, main.source.hashes()):
        message = f"{overlap}: what is measured there was learned by heart" if "for example" in overlap else overlap
        problem = Problem(code="data.shared-with-split", message=message, where=main.source.paths[0], hint=f"remove them from {name}")
        yield Found("warning", problem if "for example" in overlap else replace(problem, hint=None))


def _far_too_long(side: Side) -> Iterator[Found]:
    lengths, unit = (side.facts.needed, "tokens") if side.tokens else (side.facts.characters, "characters")
    some = lengths[side.facts.usable]
    if len(some) < _MIN_ROWS:
        return
    usual = max(1, int(np.quantile(some, _LONG_SHARE)))
    for number in np.flatnonzero(side.facts.usable & (lengths > _LONG_FACTOR * usual)).tolist():
        message = f"{lengths[number]:,} {unit}, where {_LONG_SHARE:.0%} of the rows have at most {usual:,}"
        hint = f"llamahome data show {shlex.quote(side.source.paths[int(side.facts.files[number])])} --longest"
        yield _warn(side, number, "data.far-too-long", message, hint)


def _rare_language(side: Side) -> Iterator[Found]:
    languages = side.facts.languages.tolist()
    usual, rare = rare_languages(languages)
    counts = Counter(languages)
    for number, language in enumerate(languages):
        if language in rare:
            message = f"the answer seems to be in {language}, as in {counts[language]:,} of {len(languages):,} rows; most are in {usual}"
            yield _warn(side, number, "data.rare-language", message, "remove it, unless it is meant")


def _open_ends(side: Side) -> Iterator[Found]:
    """Long answers without a mark at the end, if nearly all long answers have one."""
    closed, opened = int((side.facts.endings == 1).sum()), np.flatnonzero(side.facts.endings == 2)
    if closed + len(opened) < _MIN_ROWS or closed < _CLOSED_SHARE * (closed + len(opened)):
        return
    for number in opened.tolist():
        end = " ".join(answer_text(side.conversation(number)).split()[-3:])
        message = (
            f"the answer may be cut: it ends in {end[-40:]!r}, where {closed:,} of {closed + len(opened):,} long answers end in a mark"
        )
        yield _warn(side, number, "data.cut-answer", message, "read the original again, or remove the row")


def _similar_answers(side: Side) -> Iterator[Found]:
    """One warning if a long answer is in many rows, and one if many different answers end at the same length, which none exceeds."""
    rows = np.flatnonzero(side.facts.usable & (side.facts.answered >> np.uint64(32) >= _MIN_ANSWER))
    least = max(_MIN_REPEATED, len(side.facts) // 100)
    marks, first, counts = np.unique(side.facts.answered[rows], return_index=True, return_counts=True)
    if len(marks) and counts.max() >= least:
        most, number = int(counts.max()), int(rows[first[counts.argmax()]])
        message = f"this answer is in {most:,} of {len(side.facts):,} rows: it is learned for all of them"
        yield _warn(
            side,
            number,
            "data.repeated-answer",
            message,
            "remove the rows, unless it is meant",
            text=answer_text(side.conversation(number)),
        )
    different = rows[first]
    found = _cut_by_characters(marks >> np.uint64(32), least) or _cut_by_tokens(side.facts, different, least)
    if found is not None:
        at, ended = found
        number, message = int(different[at]), f"{ended}, and none is longer: they may be cut there"
        hint, text = "read the original again without the limit", answer_text(side.conversation(int(different[at])))
        yield _warn(side, number, "data.cut-answer", message, hint, text=text)


def _cut_by_characters(lengths: NDArray[np.uint64], least: int) -> tuple[int, str] | None:
    """The first of many different answers that end at the same length, which none exceeds, and how many there are."""
    often = np.unique(lengths, return_counts=True)[1]
    at_most, elsewhere = (int(often[-1]), int(often[:-1].max())) if len(often) > 1 else (0, 0)
    if at_most < max(least, 3 * elsewhere) or int(lengths.max()) < _MIN_LIMIT:  # answers made from one pattern have few lengths
        return None
    return int(lengths.argmax()), f"{at_most:,} different answers end after exactly {int(lengths.max()):,} characters"


def _cut_by_tokens(sizes: RowSizes, rows: NDArray[np.int64], least: int) -> tuple[int, str] | None:
    """The same by tokens of the model: most of these answers also end without a mark, because texts of one pattern have few lengths."""
    lengths = sizes.answer_tokens[rows]
    if not len(lengths) or not lengths.any():
        return None
    often = np.bincount(lengths, minlength=_SLACK + 1)
    limit = len(often) - 1 - int(often[: -_SLACK - 2 : -1].argmax())
    elsewhere = int(often[limit // 2 : limit - _SLACK].max(initial=0))  # of half the length or more: short answers share few lengths
    if often[limit] < max(least, 3 * elsewhere) or limit < _MIN_TOKENS:
        return None
    at = np.flatnonzero(lengths == limit)
    closed, opened = (2 * np.count_nonzero(sizes.endings[rows[at]] == ending) for ending in (1, 2))
    if closed >= len(at) or (not elsewhere and opened <= len(at)):
        return None
    return int(at[0]), f"{len(at):,} different answers end after exactly {limit:,} tokens of this model"


def _warn(side: Side, number: int, code: str, message: str, hint: str, *, text: str | None = None) -> Found:
    place = side.place(number)
    shown = excerpt(all_text(side.conversation(number)) if text is None else text, place.line)
    return Found("warning", Problem(code=code, message=message, where=place.where, excerpt=shown, hint=hint), place)
