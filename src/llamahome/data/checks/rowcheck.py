"""Finds what is wrong with each row, which goes through the same functions as in training: parse, convert, tokenize, fit.

What these functions refuse is a finding, so that a run and a check cannot disagree. If a row can be repaired, the repaired row is checked
again, so that all its faults are reported at once. Memory: one block of rows.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llamahome.config.schema import DataConfig
from llamahome.data.checks.answer_quality import (
    answer_mark,
    answer_tokens,
    end_class,
    find_weakness,
    last_answer,
    learned_answers,
    open_identifier,
    weak_answers,
)
from llamahome.data.checks.duplicates import all_text, answer_text, content_key, dialogue_text, sign
from llamahome.data.checks.findings import Found, Level, RowLocation, row_location
from llamahome.data.checks.repair import repair_bytes, repair_value
from llamahome.data.checks.repair_text import lost_at, misread_at, redecoded, unprintable_at
from llamahome.data.checks.row_sizes import RowSize, RowSizes, as_arrays
from llamahome.data.files.jsonrow import excerpt, parse_row
from llamahome.data.files.kinds import ending
from llamahome.data.files.sources import Source, open_source
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.detect import detect
from llamahome.data.rows.formats import understand
from llamahome.data.rows.jsonpath import path_in, show_path, strings
from llamahome.data.rows.markup import markup_problem
from llamahome.data.rows.rendered import rendered_problem
from llamahome.data.store.pairs import learned_of, sides, together
from llamahome.data.store.truncation import Truncation
from llamahome.data.text.end_tokens import end_setting
from llamahome.data.text.targets import Encoded, Tokenized, fit, tokenize
from llamahome.data.text.tokenizer_files import TokenizerSource
from llamahome.data.text.tokens import ChatTokenizer, open_tokenizer
from llamahome.errors import DataError, Problem

_JSON = (".jsonl", ".ndjson", ".json", "")
_PLAIN = bytes(range(0x20, 0x7F)) + b"\t\n\f\r"
"""ASCII characters that are text; a quick look for others, four times as fast as str.isprintable."""


@dataclass(frozen=True)
class CheckScope:
    """What is checked and how; everything that a worker process needs."""

    paths: tuple[str, ...]
    data: DataConfig
    format: str | None = None
    """None: the rows have no common format, and each is checked in its own."""
    tokenizer: TokenizerSource | None = None
    """None: rows are not tokenized."""
    near: bool = False
    languages: bool = False
    learned: bool = True


@dataclass(frozen=True)
class CheckedRows:
    """The result for one block of rows."""

    findings: list[Found]
    facts: RowSizes
    losses: Truncation
    """What data.max_length cuts from the rows that are not refused."""
    repairable: int
    """Refused rows that can be repaired."""


@dataclass(slots=True)
class _ConvertedRow:
    """One row as far as it could be converted. Not frozen: together with RowSize, that saved a sixth of the pass."""

    file: int
    row: int
    line: int
    conversation: Conversation | None
    """After repairs if the row was refused; None if it cannot be repaired."""
    text: str
    """All of its text."""
    refused: bool

    def place(self, source: Source) -> RowLocation:
        """The location of the row."""
        return RowLocation(source.paths[self.file], self.row, self.line)


class RowChecker:
    """Checks rows: holds the source, the tokenizer, and the language model of the extra `quality`."""

    def __init__(self, scope: CheckScope, *, source: Source | None = None, tokenizer: ChatTokenizer | None = None) -> None:
        if tokenizer is None and scope.tokenizer is not None:
            tokenizer = open_tokenizer(scope.tokenizer)
        self.scope = scope
        self.source = source if source is not None else open_source(scope.paths[0] if len(scope.paths) == 1 else scope.paths)
        self.tokenizer = tokenizer
        self._identify = open_identifier() if scope.languages else None
        self._sign = sign if scope.near else None

    def check(self, numbers: range) -> CheckedRows:
        """Check these rows, counted over all files of the source; raises DataError if a file has changed."""
        findings: list[list[Found]] = [[] for _ in numbers]
        parsed = self.source.parsed_range(numbers)
        rows = [self._convert(*arguments) for arguments in zip(numbers, parsed, findings, strict=True)]
        sizes = [self._measure(row) for row in rows]
        if self.tokenizer is not None:
            chats = [(at, sides(row.conversation)) for at, row in enumerate(rows) if row.conversation is not None]
            train_on = learned_of(self.scope.format or "", self.scope.data)
            flat = iter(tokenize([side for _, both in chats for side in both], self.tokenizer, train_on=train_on))
            for at, both in chats:
                sizes[at] = self._fit([next(flat) for _ in both], rows[at], sizes[at], findings[at])
        losses = Truncation()
        for size in sizes:
            if size.encoded is not None:
                losses.add(size.encoded, RowLocation(self.source.paths[size.file], size.row, size.line).where)
        repairable = sum(row.refused and row.conversation is not None for row in rows)
        return CheckedRows([finding for of_row in findings for finding in of_row], as_arrays(sizes), losses, repairable)

    def _convert(self, number: int, parsed: Row | Problem, findings: list[Found]) -> _ConvertedRow:
        file = self.source.file_of(number)
        if isinstance(parsed, Row):
            row, inside, line, refused = parsed, parsed.index, parsed.line, False
        else:
            place = row_location(self.source, number, parsed)
            inside, line, refused = place.row, place.line, True
            repaired = self._repair_line(number, parsed, place, findings)
            if repaired is None:
                return _ConvertedRow(file, inside, line, None, "", True)
            row = repaired
        data = self.scope.data
        name = self.scope.format or format_of(row, data)
        if name is None:  # reported once for the whole source
            return _ConvertedRow(file, inside, line, None, "", True)
        while not isinstance(result := understand(row, name, data.columns), Conversation):
            refused = True
            findings.append(self._refusal(result, RowLocation(row.source, inside, line), row.value))
            repair = repair_value(row.value, result, self.tokenizer)
            if repair is None:
                return _ConvertedRow(file, inside, line, None, "", True)
            row = replace(row, value=repair[0])
        text = all_text(result)
        if not text.isascii() or text.encode().translate(None, _PLAIN):
            findings += _damaged_text(row, RowLocation(row.source, inside, line))
        if result.text is not None and not refused:
            problems = (markup_problem(result.text, row.source, row.where), rendered_problem(result.text, row.where))
            findings += [Found("warning", problem, RowLocation(row.source, inside, line)) for problem in problems if problem is not None]
        answers = () if refused else learned_answers(result, train_on=data.train_on)
        for answer in answers:
            if find_weakness(answer) is not None:
                findings += weak_answers(answers, RowLocation(row.source, inside, line))
                break
        return _ConvertedRow(file, inside, line, result, text, refused)

    def _repair_line(self, number: int, problem: Problem, place: RowLocation, findings: list[Found]) -> Row | None:
        """The row of a line that is not valid JSON, if the line can be repaired; each of its faults becomes a finding."""
        raw = raw_of(self.source, number)
        while True:
            value = json.loads(raw) if raw is not None and problem.code == "data.repeated-key" else None
            findings.append(self._refusal(problem, place, value))
            repair = repair_bytes(raw, problem) if raw is not None else None
            if repair is None:
                return None
            raw = repair[0]
            parsed = parse_row(raw, path=place.source, line=place.line, index=place.row)
            if isinstance(parsed, Row):
                return parsed
            problem = parsed

    def _refusal(self, problem: Problem, place: RowLocation, value: dict[str, Any] | None = None) -> Found:
        steps = None if value is None else path_in(problem.message, value)
        return Found(refusal_level(self.scope.data, problem.code), problem, place, show_path(steps) if steps else None)

    def _measure(self, row: _ConvertedRow) -> RowSize:
        if row.conversation is None or row.refused:
            return RowSize(row.file, row.row, row.line)
        answer = last_answer(row.conversation)
        return RowSize(
            row.file,
            row.row,
            row.line,
            usable=True,
            hash=content_key(row.conversation),
            characters=len(row.text),
            ending=end_class(answer),
            answered=0 if row.conversation.text is not None else answer_mark(answer),
            signature=None if self._sign is None else self._sign(dialogue_text(row.conversation)),
            language="" if self._identify is None else self._identify(answer_text(row.conversation)),
        )

    def _fit(self, both: Sequence[Tokenized | Problem], row: _ConvertedRow, size: RowSize, findings: list[Found]) -> RowSize:
        """The numbers of the row with its tokens, or without if it is refused; appends what is wrong to `findings`.

        `both` has one member, or the two answers of a pair, of which the better one is measured.
        """
        data, tokenizer = self.scope.data, self.tokenizer
        assert tokenizer is not None and row.conversation is not None
        limits: Any = {"max_length": data.max_length, "on_overlong": data.on_overlong}
        encoded = together([each if isinstance(each, Problem) else fit(each, **limits) for each in both])
        whole = [each for each in both if isinstance(each, Tokenized)]
        if isinstance(encoded, Encoded):
            if not row.refused:
                findings += _training_losses(encoded, tokenizer, self.scope, row.place(self.source))
            length = answer_tokens(whole[0], tokenizer.end_ids) if size.answered else 0
            return replace(size, tokenized=whole, encoded=encoded, answer_tokens=length) if size.usable else size
        assert isinstance(encoded, Problem)
        finding = self._refusal(encoded, row.place(self.source))
        if encoded.code == "data.control-token-in-text":
            value = row.conversation.row.value
            finding = replace(finding, path=_first(value, lambda text: tokenizer.control_token_in(text) is not None))
        findings.append(finding)
        return RowSize(row.file, row.row, row.line)


def refusal_level(data: DataConfig, code: str) -> Level:
    """The level of a refused row. It is a warning if bad rows are skipped, except if it is too long and that is an error."""
    return "warning" if data.on_bad_row == "skip" and code != "data.overlong" else "error"


def format_of(row: Row, data: DataConfig) -> str | None:
    """The format of this row, detected from it alone; None if none fits."""
    try:
        return detect([row], "auto", data.columns).name
    except DataError:
        return None


def _first(value: dict[str, Any], wrong: Callable[[str], bool]) -> str | None:
    """The path of the first string for which `wrong` is true."""
    return next((show_path(steps) for steps, text in strings(value) if wrong(text)), None)


def _damaged_text(row: Row, place: RowLocation) -> Iterator[Found]:
    """At most one finding each of wrongly decoded text, lost characters and control characters."""
    for code, find in (("data.mojibake", misread_at), ("data.lost-characters", lost_at), ("data.control-character", unprintable_at)):
        for steps, text in strings(row.value):
            at = find(text)
            if at is not None:
                problem = _damage(code, show_path(steps), text, at, place)
                yield Found("warning", problem, place, show_path(steps))
                break


def _damage(code: str, path: str, text: str, at: int, place: RowLocation) -> Problem:
    shown: str | None = excerpt(text, place.line, at=at)
    if code == "data.mojibake":
        message = f"was read in the wrong encoding: {text[max(0, at - 8) : at + 8]!r}"
        hint = "llamahome data check with --fix OUT writes it as it was" if redecoded(text) else "read the original again as UTF-8"
    elif code == "data.lost-characters":
        message = "contains the replacement character U+FFFD: what stood there is lost"
        hint = "read the original again in its own encoding, or remove the row"
    else:
        message, shown = f"contains the control character U+{ord(text[at]):04X}, which is no text", None
        hint = "take it out, or remove the row"
    return Problem(code=code, message=f"{path} {message}", where=place.where, excerpt=shown, hint=hint)


def _training_losses(encoded: Encoded, tokenizer: ChatTokenizer, scope: CheckScope, place: RowLocation) -> Iterator[Found]:
    """What training does not learn from a row that it accepts: what is cut, left out, or has no end."""
    data = scope.data

    def warn(code: str, message: str, hint: str | None) -> Found:
        return Found("warning", Problem(code=code, message=message, where=place.where, hint=hint), place)

    count, keep_all = encoded.needed, f"--set data.max_length={encoded.needed} keeps all of it"
    if encoded.outcome != "whole":
        what = {"dropped": "the row is left out", "split": f"it is split into {len(encoded.examples)}"}
        cut, answers_cut = sum(part.cut for part in encoded.examples), sum(part.cut_targets for part in encoded.examples)
        otherwise = f", {answers_cut:,} of them learned otherwise" if scope.learned else ""
        became = what.get(encoded.outcome, f"{cut:,} are cut off{otherwise}")
        yield warn("data.overlong", f"{count:,} tokens, more than data.max_length {data.max_length:,}: {became}", keep_all)
    learned = [part.tokens[part.targets] for part in encoded.examples]
    if encoded.outcome == "dropped":
        return
    if not any(len(part) for part in learned):
        hint = keep_all if encoded.outcome == "truncated" else "write a longer text, or remove the row"
        why = "no token of the row is learned, so it" if scope.learned else "data.max_length ends within the prompt, so the row"
        yield warn("data.nothing-learned", f"{why} is left out", hint)
    elif scope.learned and not any(
        len(part) and (int(part[-1]) in tokenizer.end_ids or np.isin(part, tokenizer.end_ids).any()) for part in learned
    ):
        setting = end_setting(tokenizer) if tokenizer.eos_id is None else None
        message = "the model never learns to end here: no end-of-turn token is learned"
        yield warn("data.end-not-learned", message, keep_all if encoded.outcome == "truncated" else setting)


def raw_of(source: Source, number: int) -> bytes | None:
    """The bytes of row `number` as they are in the file; None if the file does not hold JSON."""
    return source.raw(number) if ending(source.paths[source.file_of(number)]) in _JSON else None
