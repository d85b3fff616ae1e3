"""All rows of a path to tables of examples to train and to evaluate on, with a report in which every row is counted.

Rows are read, understood and tokenized in batches; memory holds one batch of text and the tokens of all (5 bytes each).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from llamahome.config.schema import DataConfig
from llamahome.data.detect import SAMPLE, DetectedFormat, detect
from llamahome.data.formats import OWN_NAMES, Names, understand
from llamahome.data.holdout import content_hash, held_out
from llamahome.data.losses import Losses
from llamahome.data.records import Conversation, Example, Row
from llamahome.data.report import Report
from llamahome.data.sources import Source, open_source
from llamahome.data.table import ExampleTable as ExampleTable
from llamahome.data.table import build_table, join
from llamahome.data.targets import Encoded, encode
from llamahome.data.tokens import ChatTokenizer, require_chat_template
from llamahome.errors import DataError, Problem

_BATCH = 512
"""Rows tokenized together; enough to keep every processor busy, little enough to hold."""
_SHOWN = 20
"""Bad rows that are listed."""


@dataclass(frozen=True)
class Prepared:
    """What a run trains and evaluates on."""

    train: ExampleTable
    evaluation: ExampleTable | None
    """None when nothing is held out."""
    report: Report


@dataclass
class _Tally:
    """Counts while one source is read."""

    bad: int = 0
    problems: list[Problem] = field(default_factory=list)
    """The first bad rows."""
    overlong: int = 0
    """Rows refused because on_overlong is error; data.on_bad_row does not excuse them."""
    longest_needed: int = 0
    """max_length that keeps all of the longest row refused or left without a target."""
    truncated: int = 0
    dropped: int = 0
    split: int = 0
    without_targets: int = 0
    kept: int = 0
    cut_tokens: int = 0
    cut_targets: int = 0
    losses: Losses = field(default_factory=Losses)


@dataclass(frozen=True)
class _Read:
    """One source, read."""

    source: Source
    detected: DetectedFormat
    table: ExampleTable
    tally: _Tally


def prepare(data: DataConfig, path: str, tokenizer: ChatTokenizer, *, say: Callable[[str], None]) -> Prepared:
    """Read `path`, and data.eval_path when there is one; raises DataError with all bad rows when they are too many."""
    main = _read(data, path, tokenizer, say=say)
    if data.eval_path is not None:
        other = _read(data, data.eval_path, tokenizer, say=say)
        shared = int(np.isin(main.table.hashes, other.table.hashes).sum())
        return Prepared(main.table, other.table, _report((main, other), (main.table, other.table), tokenizer, shared=shared))
    chosen = held_out(main.table.hashes, data.eval_split)
    train = main.table.select(np.flatnonzero(~chosen))
    evaluation = main.table.select(np.flatnonzero(chosen)) if chosen.any() else None
    return Prepared(train, evaluation, _report((main,), (train, evaluation), tokenizer, shared=0))


def first_format(source: Source, wanted: str, names: Names = OWN_NAMES) -> DetectedFormat:
    """The format of the first rows that are JSON objects; raises DataError when there are none, or when it cannot be told."""
    sample = [source.parsed(number) for number in range(min(SAMPLE, len(source)))]
    rows = [row for row in sample if isinstance(row, Row)]
    if not rows:
        raise DataError([row for row in sample if isinstance(row, Problem)][:_SHOWN])
    return detect(rows, wanted, names)


def _read(data: DataConfig, path: str, tokenizer: ChatTokenizer, *, say: Callable[[str], None]) -> _Read:
    source = open_source(path)
    detected = first_format(source, data.format, data.columns)
    if detected.name != "text":
        require_chat_template(tokenizer, what=f"the rows are chats ({detected.name})")
    say(f"{path}: {len(source):,} rows, format {detected.name} ({detected.reason})")
    tally = _Tally()
    tables = []
    for begin in range(0, len(source), _BATCH):
        numbers = range(begin, min(begin + _BATCH, len(source)))
        tables.append(_read_batch([source.parsed(number) for number in numbers], data, detected.name, tokenizer, source.paths, tally))
    source.close()
    _judge(data, path, len(source), tally)
    table = join(tables, source.paths)
    if not len(table):
        raise DataError(_no_targets(data, path, tally))
    too_much = tally.losses.judge(data, path)
    if too_much is not None:
        raise DataError(too_much)
    return _Read(source, detected, table, tally)


def _read_batch(
    rows: list[Row | Problem], data: DataConfig, format_name: str, tokenizer: ChatTokenizer, paths: tuple[str, ...], tally: _Tally
) -> ExampleTable:
    understood = [row if isinstance(row, Problem) else understand(row, format_name, data.columns) for row in rows]
    conversations = [found for found in understood if isinstance(found, Conversation)]
    results = iter(encode(conversations, tokenizer, train_on=data.train_on, max_length=data.max_length, on_overlong=data.on_overlong))
    examples: list[Example] = []
    hashes: list[int] = []
    for found in understood:
        if isinstance(found, Problem):
            _count_bad(found, tally)
            continue
        result = next(results)
        if isinstance(result, Problem):
            _count_bad(result, tally)
            continue
        kept = _count(found, result, tally)
        examples += kept
        hashes += [content_hash(found)] * len(kept)
    return build_table(examples, hashes, paths)


def _count_bad(problem: Problem, tally: _Tally) -> None:
    tally.bad += 1
    if problem.code == "data.overlong":
        tally.overlong += 1
    if len(tally.problems) < _SHOWN:
        tally.problems.append(problem)


def _count(conversation: Conversation, encoded: Encoded, tally: _Tally) -> list[Example]:
    """The row's examples that teach something."""
    tally.losses.add(encoded, conversation.row.where)
    if encoded.outcome == "dropped":
        tally.dropped += 1
        tally.cut_tokens += encoded.num_tokens
        tally.cut_targets += encoded.num_targets
        tally.longest_needed = max(tally.longest_needed, encoded.num_tokens)
        return []
    tally.truncated += encoded.outcome == "truncated"
    tally.split += encoded.outcome == "split"
    tally.cut_tokens += sum(example.cut for example in encoded.examples)
    tally.cut_targets += sum(example.cut_targets for example in encoded.examples)
    kept = [example for example in encoded.examples if example.targets.any()]
    if kept:
        tally.kept += 1
    else:
        tally.without_targets += 1
        tally.longest_needed = max(tally.longest_needed, encoded.num_tokens)
    return kept


def _judge(data: DataConfig, path: str, rows: int, tally: _Tally) -> None:
    """Raise DataError when the bad rows are more than the settings allow."""
    if tally.overlong and data.on_overlong == "error":
        hint = "--set data.on_overlong=truncate cuts their end off, drop leaves them out"
    elif not tally.bad or (data.on_bad_row == "skip" and tally.bad <= data.max_bad_share * rows + 1e-9):
        return
    else:
        hint = _skip_hint(tally, rows, data.max_bad_share)
    more = f", the first {_SHOWN} are listed" if tally.bad > _SHOWN else ""
    allowed = f"; data.max_bad_share allows {data.max_bad_share:g}" if data.on_bad_row == "skip" else ""
    message = f"{tally.bad:,} of {rows:,} rows cannot be used{more}{allowed}"
    raise DataError([*tally.problems, Problem(code="data.bad-rows", message=message, where=path, hint=hint)])


def _skip_hint(tally: _Tally, rows: int, allowed: float) -> str:
    if tally.bad == rows:
        hints = {problem.hint for problem in tally.problems}
        return (hints.pop() if len(hints) == 1 else None) or "mend the rows; not one of them can be used"
    share = np.ceil(tally.bad / rows * 1e4) / 1e4
    wider = f" --set data.max_bad_share={min(share, 0.9999):g}" if tally.bad > allowed * rows else ""
    return f"mend them, or leave them out with --set data.on_bad_row=skip{wider}"


def _no_targets(data: DataConfig, path: str, tally: _Tally) -> Problem:
    lost = tally.truncated + tally.dropped
    if lost:
        message = f"nothing is left to learn: data.max_length {data.max_length:,} cuts every answer off"
        hint = f"--set data.max_length={tally.longest_needed} keeps all of the longest row"
    else:
        message, hint = "nothing is left to learn: no row has more than one token", "give longer texts"
    return Problem(code="data.no-targets", message=message, where=path, hint=hint)


def _report(read: tuple[_Read, ...], tables: tuple[ExampleTable, ExampleTable | None], tokenizer: ChatTokenizer, *, shared: int) -> Report:
    train, evaluation = tables
    present = [table for table in tables if table is not None]
    tallies = [one.tally for one in read]
    longest = max((tally.losses for tally in tallies), key=lambda losses: losses.longest_tokens)
    row_keys = np.stack((evaluation.sources, evaluation.rows)) if evaluation is not None else np.empty((2, 0), np.int64)
    return Report(
        format=read[0].detected.name,
        reason=read[0].detected.reason,
        files=sum(len(one.source.paths) for one in read),
        rows=sum(len(one.source) for one in read),
        kept=sum(tally.kept for tally in tallies),
        train_examples=len(train),
        eval_examples=len(evaluation) if evaluation is not None else 0,
        eval_rows=np.unique(row_keys, axis=1).shape[1],
        bad=sum(tally.bad for tally in tallies),
        overlong_truncated=sum(tally.truncated for tally in tallies),
        overlong_dropped=sum(tally.dropped for tally in tallies),
        split=sum(tally.split for tally in tallies),
        without_targets=sum(tally.without_targets for tally in tallies),
        tokens=sum(len(table.tokens) for table in present),
        targets=sum(int(table.targets.sum()) for table in present),
        cut_tokens=sum(tally.cut_tokens for tally in tallies),
        cut_targets=sum(tally.cut_targets for tally in tallies),
        longest_tokens=longest.longest_tokens,
        longest_where=longest.longest_where,
        duplicates=sum(_duplicates(one.table) for one in read),
        shared_with_eval=shared,
        ignored_files=tuple(path for one in read for path in one.source.ignored),
        notes=tokenizer.notes if any(one.detected.name != "text" for one in read) else (),
    )


def _duplicates(table: ExampleTable) -> int:
    """Rows (not examples: a split row has several) whose content came before."""
    rows = len(np.unique(np.stack((table.sources, table.rows)), axis=1)[0])
    return rows - len(np.unique(table.hashes))
