"""`data check --fix`: a cleaned copy of data and a record of every change. Unusable and repeated rows are left out.

Rows are repaired only where nothing has to be guessed. The copy is JSON lines whatever the source was; a line that needs no change is
copied as it is. Copy and record appear complete or not at all, and the source is never written to. Memory: one block of rows, and about
200 bytes per row that is kept.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from llamahome.config.schema import DataConfig
from llamahome.data.checks.check import Request, has_byte_order_mark
from llamahome.data.checks.duplicates import content_key
from llamahome.data.checks.findings import RowLocation, row_location
from llamahome.data.checks.fix_files import PreviewFile, Readable, readable, replacing
from llamahome.data.checks.repair import Change, repair_bytes, repair_misread, repair_value
from llamahome.data.checks.repair_text import objects_in
from llamahome.data.checks.rowcheck import raw_of
from llamahome.data.files.encoding import encoding_of
from llamahome.data.files.jsonrow import parse_row
from llamahome.data.files.kinds import CHANGES
from llamahome.data.files.sources import Source, open_source
from llamahome.data.files.splits import to_train
from llamahome.data.files.spool import content_place
from llamahome.data.prepare import first_format
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.detect import SAMPLE, detect
from llamahome.data.rows.formats import understand
from llamahome.data.text.targets import encode
from llamahome.data.text.tokens import ChatTokenizer, open_tokenizer
from llamahome.errors import DataError, Problem, UsageError

_BLOCK_ROWS = 512
_MAX_REPAIRS = 100
"""A row that needs more repairs is left out."""


@dataclass
class Fixed:
    """What became of the rows."""

    kept: int = 0
    repaired: int = 0
    """Kept rows that were changed."""
    dropped: int = 0
    changes: Counter[str] = field(default_factory=Counter)
    """How often each kind of finding was repaired or was the reason to drop a row."""


@dataclass
class _RowRepair:
    """One row and what was done to it so far."""

    place: RowLocation
    raw: bytes | None
    """The line of the source, if the source has lines."""
    row: Row | None
    changes: list[Change] = field(default_factory=list)
    conversation: Conversation | None = None
    refused: Problem | None = None
    """Why it is dropped."""


def refuse_output(out: Path, paths: Sequence[str], *, force: bool) -> None:
    """Raise UsageError if the copy would overwrite something, or would be in a folder that is read as data."""
    inputs = {Path(path).resolve() for path in paths}
    for target in (out, out.with_name(out.name + CHANGES)):
        if inputs & {target.resolve(), *target.resolve().parents}:
            message, hint = "the copy would be inside the data that it is made from", "--fix with a file beside it, not in it"
            raise UsageError(Problem(code="usage.fix-in-place", message=message, where=str(target), hint=hint))
        if target.is_dir():
            message, hint = "this is a folder", f"--fix '{target / 'clean.jsonl'}'"
            raise UsageError(Problem(code="usage.file-exists", message=message, where=str(target), hint=hint))
        if target.exists() and not force:
            raise UsageError(
                Problem(code="usage.file-exists", message="the file exists already", where=str(target), hint="--force overwrites it")
            )


def fix(request: Request, out: Path, *, force: bool = False, preview: Callable[[dict[str, Any]], None] | None = None) -> Fixed:
    """Write the cleaned copy to `out` and the record beside it. With `preview` nothing is written; it is called with each entry instead.

    Raises DataError, and writes nothing, if the rows have no common format or none of them can be used.
    """
    with readable(request.paths) as inputs:
        source = open_source(inputs.paths[0] if len(inputs.paths) == 1 else inputs.paths, wanted=to_train(request.data))
        if preview is None:
            refuse_output(out, (*request.paths, *(inputs.originals.get(path, path) for path in source.paths)), force=force)
        try:
            return _write_files(request, source, inputs, out, preview)
        finally:
            source.close()


def _write_files(request: Request, source: Source, inputs: Readable, out: Path, preview: Callable[[dict[str, Any]], None] | None) -> Fixed:
    name = _format(source, request.data)
    tokenizer = None if request.tokenizer is None else open_tokenizer(request.tokenizer)
    fixed = Fixed()
    record = out.with_name(out.name + CHANGES)
    written = replacing(out, record) if preview is None else contextlib.nullcontext((PreviewFile(None), PreviewFile(preview)))
    with written as (rows, log):
        for path, change in inputs.changes:
            _note(log, RowLocation(path, 0, 1), change, fixed)
        for path in source.paths:
            if has_byte_order_mark(path):
                _note(log, RowLocation(path, 0, 1), Change("data.byte-order-mark", None, "\ufeff", ""), fixed)
        earlier: dict[int, RowLocation] = {}
        first: list[Row] = []
        for repair in _repairs(source, name, request.data, tokenizer):
            repair.place = replace(repair.place, source=inputs.originals.get(repair.place.source, repair.place.source))
            if _write(repair, rows, log, earlier, fixed) and repair.row is not None and len(first) < SAMPLE:
                first.append(repair.row)
        if not fixed.kept:
            message = "not one row can be used, so there is nothing to write"
            raise DataError(Problem(code="data.nothing-to-keep", message=message, where=" ".join(request.paths)))
        detect(first, request.data.format, request.data.columns)  # raises DataError: the first of the kept rows may have another format
    return fixed


def _format(source: Source, data: DataConfig) -> str:
    """The format of the rows as they are, or, if it cannot be detected, of the first rows after repair."""
    try:
        return first_format(source, data.format, data.columns).name
    except DataError:
        repairs = [repair for number in range(min(len(source), _BLOCK_ROWS)) for repair in _parse(source, number)]
        rows = [repair.row for repair in repairs if repair.row is not None][:SAMPLE]
        if not rows or not any(repair.changes for repair in repairs):
            raise
        return detect(rows, data.format, data.columns).name


def _repairs(source: Source, name: str, data: DataConfig, tokenizer: ChatTokenizer | None) -> Iterator[_RowRepair]:
    for begin in range(0, len(source), _BLOCK_ROWS):
        numbers = range(begin, min(begin + _BLOCK_ROWS, len(source)))
        block = [repair for number in numbers for repair in _parse(source, number)]
        for repair in block:
            _repair_text(repair, name, data)
        if tokenizer is not None:
            _repair_tokens(block, name, data, tokenizer)
        yield from block


def _parse(source: Source, number: int) -> list[_RowRepair]:
    """The row, parsed after its bytes were repaired; a line that holds several objects gives several rows."""
    parsed = source.parsed(number)
    place = row_location(source, number, parsed)
    repair = _RowRepair(place, raw_of(source, number), None)
    raw = repair.raw
    while isinstance(parsed, Problem):
        encoding = encoding_of(content_place(place.source)) if parsed.code == "data.not-utf8" else None
        repaired = repair_bytes(raw, parsed, encoding) if raw is not None else None
        if repaired is None:
            repair.refused = parsed
            return _split_objects(repair, raw, parsed)
        raw, change = repaired
        repair.changes.append(change)
        parsed = parse_row(raw, path=place.source, line=place.line, index=place.row)
    repair.row = parsed
    return [repair]


def _split_objects(repair: _RowRepair, raw: bytes | None, problem: Problem) -> list[_RowRepair]:
    """One row for each object of the line, or the refused line if it does not hold several."""
    if raw is None or problem.code not in ("data.bad-json", "data.not-an-object"):
        return [repair]
    line = raw.decode("utf-8")
    place = repair.place
    objects = [(text, parse_row(text.encode(), path=place.source, line=place.line, index=place.row)) for text in objects_in(line)]
    pieces = [
        _RowRepair(place, None, row, [*repair.changes, Change(problem.code, None, line, text)])
        for text, row in objects
        if isinstance(row, Row)
    ]
    return pieces if pieces and len(pieces) == len(objects) else [repair]


def _repair_text(repair: _RowRepair, name: str, data: DataConfig) -> None:
    """Correct wrongly decoded text, then convert the row."""
    if repair.row is not None:
        redecoded = repair_misread(repair.row.value)
        if redecoded is not None:
            _apply(repair, *redecoded)
        _convert(repair, name, data, None)


def _apply(repair: _RowRepair, value: dict[str, Any], changes: list[Change]) -> None:
    assert repair.row is not None
    repair.row = Row(repair.row.index, repair.row.source, repair.row.line, value)
    repair.changes += changes


def _convert(repair: _RowRepair, name: str, data: DataConfig, tokenizer: ChatTokenizer | None) -> None:
    """Repair the row until it can be converted or no repair is left."""
    for _ in range(_MAX_REPAIRS):
        assert repair.row is not None
        result = understand(repair.row, name, data.columns)
        if isinstance(result, Conversation):
            repair.conversation, repair.refused = result, None
            return
        repair.conversation, repair.refused = None, result
        repaired = repair_value(repair.row.value, result, tokenizer)
        if repaired is None:
            return
        _apply(repair, *repaired)


def _repair_tokens(block: Sequence[_RowRepair], name: str, data: DataConfig, tokenizer: ChatTokenizer) -> None:
    """Split the control tokens of rows that cannot be tokenized, and refuse the rows that still cannot."""
    waiting = [repair for repair in block if repair.conversation is not None]
    for _ in range(_MAX_REPAIRS):
        chats = [repair.conversation for repair in waiting if repair.conversation is not None]
        results = encode(chats, tokenizer, train_on=data.train_on, max_length=data.max_length, on_overlong=data.on_overlong)
        again = []
        for repair, result in zip(waiting, results, strict=True):
            if not isinstance(result, Problem) or repair.row is None:
                continue
            repair.refused = result
            repaired = repair_value(repair.row.value, result, tokenizer)
            if repaired is not None:
                _apply(repair, *repaired)
                _convert(repair, name, data, tokenizer)
                again.append(repair)
        waiting = [repair for repair in again if repair.conversation is not None]
        if not waiting:
            return
    for repair in waiting:
        problem = Problem(code="data.control-token-in-text", message="it cannot be repaired", where=repair.place.where)
        repair.refused = repair.refused or problem


def _write(repair: _RowRepair, rows: TextIO, log: TextIO, earlier: dict[int, RowLocation], fixed: Fixed) -> bool:
    """Write the row and its changes, or the reason why it is dropped; returns whether it was kept."""
    text = repair.raw.decode("utf-8", "backslashreplace") if repair.raw is not None else _text(repair.row)
    if repair.conversation is None or repair.refused is not None:
        code = repair.refused.code if repair.refused is not None else "data.bad-rows"
        _drop(log, repair.place, code, text, repair.refused.message if repair.refused else "", fixed)
        return False
    key = content_key(repair.conversation)
    if key in earlier:
        _drop(log, repair.place, "data.duplicate", text, f"says the same as {earlier[key].where}", fixed)
        return False
    earlier[key] = repair.place
    fixed.kept += 1
    fixed.repaired += bool(repair.changes)
    for change in repair.changes:
        _note(log, repair.place, change, fixed)
    unchanged = repair.raw is not None and not repair.changes and b"\n" not in repair.raw
    rows.write((text.strip() if unchanged else _text(repair.row)) + "\n")
    return True


def _text(row: Row | None) -> str:
    return "" if row is None else json.dumps(row.value, ensure_ascii=False, default=str)


def _drop(log: TextIO, place: RowLocation, code: str, text: str, why: str, fixed: Fixed) -> None:
    fixed.dropped += 1
    fixed.changes[code] += 1
    _line(log, place, {"what": "dropped", "code": code, "path": None, "why": why, "before": text, "after": None})


def _note(log: TextIO, place: RowLocation, change: Change, fixed: Fixed) -> None:
    fixed.changes[change.what] += 1
    _line(log, place, {"what": "mended", "code": change.what, "path": change.path, "before": change.before, "after": change.after})


def _line(log: TextIO, place: RowLocation, entry: dict[str, Any]) -> None:
    log.write(json.dumps({"source": place.source, "row": place.row, "line": place.line, **entry}, ensure_ascii=False) + "\n")
