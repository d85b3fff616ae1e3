"""What is wrong with each row, found by sending it the way that training sends it: parsed, understand, tokenize, fit.

What those refuse is a finding, so a run and a check cannot disagree. A row that can be mended is looked at again as it would be then, and
so all its faults are told at once. Memory: one stretch of rows.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llamahome.config.schema import DataConfig
from llamahome.data.checks.duplicates import answers, content_key, exchanged, open_signer, said
from llamahome.data.checks.facts import Facts, Measured, lay_out
from llamahome.data.checks.findings import Found, Level, Place, row_place
from llamahome.data.checks.languages import open_identifier
from llamahome.data.checks.learned import end_class, weak_answers
from llamahome.data.checks.losses import Losses
from llamahome.data.checks.mend import mend_bytes, mend_value
from llamahome.data.checks.mojibake import lost_at, misread_at, repaired, unprintable_at
from llamahome.data.files.jsonrow import excerpt, parse_row
from llamahome.data.files.kinds import ending
from llamahome.data.files.sources import Source, open_source
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.detect import detect
from llamahome.data.rows.formats import understand
from llamahome.data.rows.jsonpath import path_in, show_path, strings
from llamahome.data.text.ends import end_setting
from llamahome.data.text.place import TokenizerPlace
from llamahome.data.text.targets import Encoded, Tokenized, fit, tokenize
from llamahome.data.text.tokens import ChatTokenizer, open_tokenizer
from llamahome.errors import DataError, Problem

_JSON = (".jsonl", ".ndjson", ".json", "")


@dataclass(frozen=True)
class Scope:
    """What is looked at and how: all that a process needs to know."""

    paths: tuple[str, ...]
    data: DataConfig
    format: str | None = None
    """None: there is no one format; each row is taken in its own."""
    tokenizer: TokenizerPlace | None = None
    """None: tokens are not looked at."""
    near: bool = False
    languages: bool = False


@dataclass(frozen=True)
class Looked:
    """A stretch of rows, looked at."""

    findings: list[Found]
    facts: Facts
    losses: Losses
    """What data.max_length takes from the rows that are not refused."""
    mendable: int
    """Rows that are refused as they are and could be mended."""


@dataclass(slots=True)
class _Read:
    """One row as far as it could be understood; not frozen: with Measured, that saved a sixth of the whole pass."""

    file: int
    row: int
    line: int
    conversation: Conversation | None
    """After mending where the row was refused; None where it cannot be mended."""
    text: str
    """All that it says."""
    refused: bool

    def place(self, source: Source) -> Place:
        """Where it is."""
        return Place(source.paths[self.file], self.row, self.line)


class Looker:
    """What one process needs to look at rows: the source, the tokenizer, and the models of the extra `quality`."""

    def __init__(self, scope: Scope, *, source: Source | None = None, tokenizer: ChatTokenizer | None = None) -> None:
        if tokenizer is None and scope.tokenizer is not None:
            tokenizer = open_tokenizer(scope.tokenizer)
        self.scope = scope
        self.source = source if source is not None else open_source(scope.paths[0] if len(scope.paths) == 1 else scope.paths)
        self.tokenizer = tokenizer
        self._identify = open_identifier() if scope.languages else None
        self._sign = open_signer() if scope.near else None

    def look(self, numbers: range) -> Looked:
        """These rows of the source, counted over all its files; raises DataError when a file changed meanwhile."""
        findings: list[list[Found]] = [[] for _ in numbers]
        parsed = self.source.parsed_range(numbers)
        read = [self._read(*one) for one in zip(numbers, parsed, findings, strict=True)]
        measured = [self._measure(one) for one in read]
        if self.tokenizer is not None:
            chats = [(at, one.conversation) for at, one in enumerate(read) if one.conversation is not None]
            wholes = tokenize([conversation for _, conversation in chats], self.tokenizer, train_on=self.scope.data.train_on)
            for (at, _), whole in zip(chats, wholes, strict=True):
                measured[at] = self._fit(whole, read[at], measured[at], findings[at])
        losses = Losses()
        for one in measured:
            if one.encoded is not None:
                losses.add(one.encoded, Place(self.source.paths[one.file], one.row, one.line).where)
        mendable = sum(one.refused and one.conversation is not None for one in read)
        return Looked([found for row in findings for found in row], lay_out(measured), losses, mendable)

    def _read(self, number: int, parsed: Row | Problem, findings: list[Found]) -> _Read:
        file = self.source.file_of(number)
        if isinstance(parsed, Row):
            row, inside, line, refused = parsed, parsed.index, parsed.line, False
        else:
            place = row_place(self.source, number, parsed)
            inside, line, refused = place.row, place.line, True
            mended = self._without_stray_bytes(number, parsed, place, findings)
            if mended is None:
                return _Read(file, inside, line, None, "", True)
            row = mended
        data = self.scope.data
        name = self.scope.format or format_of(row, data)
        if name is None:  # told once, of the whole source
            return _Read(file, inside, line, None, "", True)
        while not isinstance(found := understand(row, name, data.columns), Conversation):
            refused = True
            findings.append(self._refusal(found, Place(row.source, inside, line), row.value))
            better = mend_value(row.value, found, self.tokenizer)
            if better is None:
                return _Read(file, inside, line, None, "", True)
            row = replace(row, value=better[0])
        text = said(found)
        if not text.isascii() or unprintable_at(text) is not None:
            findings += _spoilt(row, Place(row.source, inside, line))
        if not refused:
            findings += weak_answers(found, Place(row.source, inside, line), train_on=data.train_on)
        return _Read(file, inside, line, found, text, refused)

    def _without_stray_bytes(self, number: int, problem: Problem, place: Place, findings: list[Found]) -> Row | None:
        """The row that a broken line would be if its stray bytes were not there; every fault is told on the way."""
        raw = raw_of(self.source, number)
        while True:
            told = json.loads(raw) if raw is not None and problem.code == "data.repeated-key" else None
            findings.append(self._refusal(problem, place, told))
            mended = mend_bytes(raw, problem) if raw is not None else None
            if mended is None:
                return None
            raw = mended[0]
            parsed = parse_row(raw, path=place.source, line=place.line, index=place.row)
            if isinstance(parsed, Row):
                return parsed
            problem = parsed

    def _refusal(self, problem: Problem, place: Place, value: dict[str, Any] | None = None) -> Found:
        steps = None if value is None else path_in(problem.message, value)
        return Found(refusal_level(self.scope.data, problem.code), problem, place, show_path(steps) if steps else None)

    def _measure(self, read: _Read) -> Measured:
        if read.conversation is None or read.refused:
            return Measured(read.file, read.row, read.line)
        return Measured(
            read.file,
            read.row,
            read.line,
            usable=True,
            hash=content_key(read.conversation),
            characters=len(read.text),
            ending=end_class(read.conversation),
            signature=None if self._sign is None else self._sign(exchanged(read.conversation)),
            language="" if self._identify is None else self._identify(answers(read.conversation)),
        )

    def _fit(self, whole: Tokenized | Problem, read: _Read, measured: Measured, findings: list[Found]) -> Measured:
        """The row's figures with its tokens, or as refused."""
        data, tokenizer = self.scope.data, self.tokenizer
        assert tokenizer is not None and read.conversation is not None
        encoded = whole if isinstance(whole, Problem) else fit(whole, max_length=data.max_length, on_overlong=data.on_overlong)
        if isinstance(whole, Tokenized) and isinstance(encoded, Encoded):
            if not read.refused:
                findings += _teaching(whole, encoded, tokenizer, data, read.place(self.source))
            return replace(measured, whole=whole, encoded=encoded) if measured.usable else measured
        assert isinstance(encoded, Problem)
        found = self._refusal(encoded, read.place(self.source))
        if encoded.code == "data.control-token-in-text":
            row = read.conversation.row
            found = replace(found, path=_first(row.value, lambda text: tokenizer.control_token_in(text) is not None))
        findings.append(found)
        return Measured(read.file, read.row, read.line)


def refusal_level(data: DataConfig, code: str) -> Level:
    """Whether a refused row stops the run: not where such rows are left out, but one that is too long does where that is an error."""
    return "warning" if data.on_bad_row == "skip" and code != "data.overlong" else "error"


def format_of(row: Row, data: DataConfig) -> str | None:
    """The format of this one row."""
    try:
        return detect([row], "auto", data.columns).name
    except DataError:
        return None


def _first(value: dict[str, Any], wrong: Callable[[str], bool]) -> str | None:
    """The path of the first string that is wrong."""
    return next((show_path(steps) for steps, text in strings(value) if wrong(text)), None)


def _spoilt(row: Row, place: Place) -> Iterator[Found]:
    """Text that was read in the wrong encoding, whose characters were lost or are none: at most one finding of each kind."""
    for steps, text in strings(row.value):
        at = misread_at(text)
        if at is not None:
            hint = "llamahome data check with --fix OUT writes it as it was" if repaired(text) else "read the original again as UTF-8"
            message = f"{show_path(steps)} was read in the wrong encoding: {text[max(0, at - 8) : at + 8]!r}"
            problem = Problem(code="data.mojibake", message=message, where=place.where, excerpt=excerpt(text, place.line, at=at), hint=hint)
            yield Found("warning", problem, place, show_path(steps))
            break
    for steps, text in strings(row.value):
        at = lost_at(text)
        if at is not None:
            message = f"{show_path(steps)} contains the replacement character U+FFFD: what stood there is lost"
            hint = "read the original again in its own encoding, or remove the row"
            shown = excerpt(text, place.line, at=at)
            yield Found(
                "warning",
                Problem(code="data.lost-characters", message=message, where=place.where, excerpt=shown, hint=hint),
                place,
                show_path(steps),
            )
            break
    for steps, text in strings(row.value):
        at = unprintable_at(text)
        if at is not None:
            message = f"{show_path(steps)} contains the control character U+{ord(text[at]):04X}, which is no text"
            hint = "take it out, or remove the row"
            yield Found(
                "warning", Problem(code="data.control-character", message=message, where=place.where, hint=hint), place, show_path(steps)
            )
            break


def _teaching(whole: Tokenized, encoded: Encoded, tokenizer: ChatTokenizer, data: DataConfig, place: Place) -> Iterator[Found]:
    """What a row does not teach although it is not refused: what is cut, left out, or without an end."""

    def warn(code: str, message: str, hint: str | None) -> Found:
        return Found("warning", Problem(code=code, message=message, where=place.where, hint=hint), place)

    count, longer = encoded.num_tokens, f"--set data.max_length={encoded.num_tokens} keeps all of it"
    if encoded.outcome != "whole":
        what = {"dropped": "the row is left out", "split": f"it is split into {len(encoded.examples)}"}
        cut, answers_cut = sum(part.cut for part in encoded.examples), sum(part.cut_targets for part in encoded.examples)
        became = what.get(encoded.outcome, f"{cut:,} are cut off, {answers_cut:,} of them learned otherwise")
        yield warn("data.overlong", f"{count:,} tokens, more than data.max_length {data.max_length:,}: {became}", longer)
    learned = [part.tokens[part.targets] for part in encoded.examples]
    if encoded.outcome == "dropped":
        return
    if not any(len(part) for part in learned):
        reason = longer if encoded.outcome == "truncated" else "write a longer text, or remove the row"
        yield warn("data.nothing-learned", "no token of the row is learned, so it is left out", reason)
    elif not any(len(part) and (int(part[-1]) in tokenizer.end_ids or np.isin(part, tokenizer.end_ids).any()) for part in learned):
        ends = end_setting(tokenizer) if tokenizer.eos_id is None else None
        hint = (
            longer if encoded.outcome == "truncated" else ends or "--set model.chat_template=FILE.jinja with a template that ends each turn"
        )
        yield warn("data.end-not-learned", "the model never learns to end here: no end-of-turn token is learned", hint)


def raw_of(source: Source, number: int) -> bytes | None:
    """The bytes of row `number` as they stand in the file, None when its kind of file does not hold JSON."""
    return source.raw(number) if ending(source.paths[source.file_of(number)]) in _JSON else None
