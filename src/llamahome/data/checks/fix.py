"""A cleaned copy of data and a record of every change: mended where nothing is guessed, without rows that are unusable or stand twice.

The copy is JSON lines whatever the source was; a line that needed nothing is copied as it stands. Copy and record appear whole or not at
all, and the source is never written to. Memory: one stretch of rows, and about 200 bytes for each row that was kept.
"""

import contextlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from llamahome.config.schema import DataConfig
from llamahome.data.checks.check import Request, marked
from llamahome.data.checks.duplicates import content_key
from llamahome.data.checks.findings import Place, row_place
from llamahome.data.checks.mend import Change, mend_bytes, mend_misread, mend_value
from llamahome.data.checks.rowcheck import raw_of
from llamahome.data.checks.wholefile import Readable, readable
from llamahome.data.files.encoding import encoding_of
from llamahome.data.files.jsonrow import parse_row
from llamahome.data.files.kinds import CHANGES
from llamahome.data.files.sources import Source, open_source
from llamahome.data.files.splits import to_train
from llamahome.data.prepare import first_format
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.detect import SAMPLE, detect
from llamahome.data.rows.formats import understand
from llamahome.data.text.targets import encode
from llamahome.data.text.tokens import ChatTokenizer, open_tokenizer
from llamahome.errors import DataError, MachineError, Problem, UsageError

_STRETCH = 512
_TRIES = 100
"""Mends of one row; more than that and it is left out."""


@dataclass
class Fixed:
    """What became of the rows."""

    kept: int = 0
    mended: int = 0
    """Kept rows that were changed."""
    dropped: int = 0
    changes: Counter[str] = field(default_factory=Counter)
    """How often each kind of finding was mended or made a row drop."""


@dataclass
class _Work:
    """A row on its way to the copy."""

    place: Place
    raw: bytes | None
    """The line as it stands, when the source has lines."""
    row: Row | None
    changes: list[Change] = field(default_factory=list)
    conversation: Conversation | None = None
    refused: Problem | None = None
    """Why it is dropped."""


def refuse_output(out: Path, paths: Sequence[str], *, force: bool) -> None:
    """UsageError when the copy would overwrite something, or lie where it is read together with its own source."""
    inputs = {Path(path).resolve() for path in paths}
    for target in (out, out.with_name(out.name + CHANGES)):
        if inputs & {target.resolve(), *target.resolve().parents}:
            message, hint = "the copy would lie in what it is made from", "--fix with a file beside it, not in it"
            raise UsageError(Problem(code="usage.fix-in-place", message=message, where=str(target), hint=hint))
        if target.is_dir():
            message, hint = "this is a folder", f"--fix '{target / 'clean.jsonl'}'"
            raise UsageError(Problem(code="usage.file-exists", message=message, where=str(target), hint=hint))
        if target.exists() and not force:
            raise UsageError(
                Problem(code="usage.file-exists", message="the file exists already", where=str(target), hint="--force overwrites it")
            )


def fix(request: Request, out: Path, *, force: bool = False, preview: Callable[[dict[str, Any]], None] | None = None) -> Fixed:
    """Write the cleaned copy to `out` and the record beside it; with `preview` nothing is written, it is given each entry.

    Raises DataError when the rows have no one format or not one of them can be used; then nothing is written.
    """
    with readable(request.paths) as found:
        source = open_source(found.paths[0] if len(found.paths) == 1 else found.paths, wanted=to_train(request.data))
        if preview is None:
            refuse_output(out, (*request.paths, *(found.originals.get(path, path) for path in source.paths)), force=force)
        try:
            return _fixed(request, source, found, out, preview)
        finally:
            source.close()


def _fixed(request: Request, source: Source, found: Readable, out: Path, preview: Callable[[dict[str, Any]], None] | None) -> Fixed:
    name = _format(source, request.data)
    tokenizer = None if request.tokenizer is None else open_tokenizer(request.tokenizer)
    fixed = Fixed()
    record = out.with_name(out.name + CHANGES)
    written = _replacing(out, record) if preview is None else contextlib.nullcontext((_Shown(None), _Shown(preview)))
    with written as (rows, log):
        for path, change in found.changes:
            _note(log, Place(path, 0, 1), change, fixed)
        for path in source.paths:
            if marked(path):
                _note(log, Place(path, 0, 1), Change("data.byte-order-mark", None, "\ufeff", ""), fixed)
        earlier: dict[int, Place] = {}
        first: list[Row] = []
        for work in _worked(source, name, request.data, tokenizer):
            work.place = replace(work.place, source=found.originals.get(work.place.source, work.place.source))
            if _write(work, rows, log, earlier, fixed) and work.row is not None and len(first) < SAMPLE:
                first.append(work.row)
        if not fixed.kept:
            message = "not one row can be used, so there is nothing to write"
            raise DataError(Problem(code="data.nothing-to-keep", message=message, where=" ".join(request.paths)))
        detect(first, request.data.format, request.data.columns)  # without the dropped rows, others are the first
    return fixed


def _format(source: Source, data: DataConfig) -> str:
    """The format of the rows as they stand, or of the first ones that can be mended into rows when none stands."""
    try:
        return first_format(source, data.format, data.columns).name
    except DataError:
        works = [_parsed(source, number) for number in range(min(len(source), _STRETCH))]
        rows = [work.row for work in works if work.row is not None][:SAMPLE]
        if not rows or not any(work.changes for work in works):
            raise
        return detect(rows, data.format, data.columns).name


def _worked(source: Source, name: str, data: DataConfig, tokenizer: ChatTokenizer | None) -> Iterator[_Work]:
    for begin in range(0, len(source), _STRETCH):
        stretch = [_mended(source, number, name, data) for number in range(begin, min(begin + _STRETCH, len(source)))]
        if tokenizer is not None:
            _mend_tokens(stretch, name, data, tokenizer)
        yield from stretch


def _parsed(source: Source, number: int) -> _Work:
    """The row, parsed as far as its bytes can be mended."""
    parsed = source.parsed(number)
    place = row_place(source, number, parsed)
    work = _Work(place, raw_of(source, number), None)
    raw = work.raw
    while isinstance(parsed, Problem):
        encoding = encoding_of(place.source) if parsed.code == "data.not-utf8" else None
        mended = mend_bytes(raw, parsed, encoding) if raw is not None else None
        if mended is None:
            work.refused = parsed
            return work
        raw, change = mended
        work.changes.append(change)
        parsed = parse_row(raw, path=place.source, line=place.line, index=place.row)
    work.row = parsed
    return work


def _mended(source: Source, number: int, name: str, data: DataConfig) -> _Work:
    """The row, parsed and understood as far as it can be mended."""
    work = _parsed(source, number)
    if work.row is None:
        return work
    misread = mend_misread(work.row.value)
    if misread is not None:
        _take(work, *misread)
    _understand(work, name, data, None)
    return work


def _take(work: _Work, value: dict[str, Any], changes: list[Change]) -> None:
    assert work.row is not None
    work.row = Row(work.row.index, work.row.source, work.row.line, value)
    work.changes += changes


def _understand(work: _Work, name: str, data: DataConfig, tokenizer: ChatTokenizer | None) -> None:
    """Mend the row until it is understood, or cannot be mended."""
    for _ in range(_TRIES):
        assert work.row is not None
        found = understand(work.row, name, data.columns)
        if isinstance(found, Conversation):
            work.conversation, work.refused = found, None
            return
        work.conversation, work.refused = None, found
        mended = mend_value(work.row.value, found, tokenizer)
        if mended is None:
            return
        _take(work, *mended)


def _mend_tokens(stretch: Sequence[_Work], name: str, data: DataConfig, tokenizer: ChatTokenizer) -> None:
    """Find the rows that cannot be tokenized, mend their control tokens, and refuse the rest."""
    waiting = [work for work in stretch if work.conversation is not None]
    for _ in range(_TRIES):
        chats = [work.conversation for work in waiting if work.conversation is not None]
        results = encode(chats, tokenizer, train_on=data.train_on, max_length=data.max_length, on_overlong=data.on_overlong)
        again = []
        for work, result in zip(waiting, results, strict=True):
            if not isinstance(result, Problem) or work.row is None:
                continue
            work.refused = result
            mended = mend_value(work.row.value, result, tokenizer)
            if mended is not None:
                _take(work, *mended)
                _understand(work, name, data, tokenizer)
                again.append(work)
        waiting = [work for work in again if work.conversation is not None]
        if not waiting:
            return
    for work in waiting:
        work.refused = work.refused or Problem(code="data.control-token-in-text", message="it cannot be mended", where=work.place.where)


def _write(work: _Work, rows: TextIO, log: TextIO, earlier: dict[int, Place], fixed: Fixed) -> bool:
    """Write the row and its changes, or only the reason why it is dropped; whether it was kept."""
    whole = work.raw.decode("utf-8", "backslashreplace") if work.raw is not None else _text(work.row)
    if work.conversation is None or work.refused is not None:
        code = work.refused.code if work.refused is not None else "data.bad-rows"
        _drop(log, work.place, code, whole, work.refused.message if work.refused else "", fixed)
        return False
    key = content_key(work.conversation)
    if key in earlier:
        _drop(log, work.place, "data.duplicate", whole, f"says the same as {earlier[key].where}", fixed)
        return False
    earlier[key] = work.place
    fixed.kept += 1
    fixed.mended += bool(work.changes)
    for change in work.changes:
        _note(log, work.place, change, fixed)
    as_it_stands = work.raw is not None and not work.changes and b"\n" not in work.raw
    rows.write((whole.strip() if as_it_stands else _text(work.row)) + "\n")
    return True


def _text(row: Row | None) -> str:
    return "" if row is None else json.dumps(row.value, ensure_ascii=False, default=str)


def _drop(log: TextIO, place: Place, code: str, whole: str, why: str, fixed: Fixed) -> None:
    fixed.dropped += 1
    fixed.changes[code] += 1
    _line(log, place, {"what": "dropped", "code": code, "path": None, "why": why, "before": whole, "after": None})


def _note(log: TextIO, place: Place, change: Change, fixed: Fixed) -> None:
    fixed.changes[change.what] += 1
    _line(log, place, {"what": "mended", "code": change.what, "path": change.path, "before": change.before, "after": change.after})


def _line(log: TextIO, place: Place, entry: dict[str, Any]) -> None:
    log.write(json.dumps({"source": place.source, "row": place.row, "line": place.line, **entry}, ensure_ascii=False) + "\n")


class _Shown(io.StringIO):
    """In the place of a file to write: gives each line, an entry of the record, to whoever shows it."""

    def __init__(self, show: Callable[[dict[str, Any]], None] | None) -> None:
        super().__init__()
        self._show = show

    def write(self, text: str, /) -> int:
        if self._show is not None:
            self._show(json.loads(text))
        return len(text)


@contextlib.contextmanager
def _replacing(*targets: Path) -> Iterator[Sequence[TextIO]]:
    """Files to write that get their names when all went well, and are removed when not."""
    parts = [target.with_name(f".{target.name}.part-{os.getpid()}.jsonl") for target in targets]
    try:
        with contextlib.ExitStack() as stack:
            targets[0].parent.mkdir(parents=True, exist_ok=True)
            files = [stack.enter_context(part.open("w", encoding="utf-8", newline="\n")) for part in parts]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        for part, target in reversed(list(zip(parts, targets, strict=True))):  # the record first: no copy is ever without one
            part.replace(target)
    except OSError as error:
        message = f"cannot write the cleaned copy: {error.strerror}"
        hint = "--fix with a place that can be written and has room"
        raise MachineError(Problem(code="machine.cannot-write", message=message, where=str(targets[0]), hint=hint)) from error
    finally:
        for part in parts:
            with contextlib.suppress(OSError):
                part.unlink()
