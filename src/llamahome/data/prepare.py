"""Everything a run needs of its data: examples to train on, their order, examples to evaluate on, and a report that counts every row.

Rows are tokenized once into a store if that takes about a minute or the store exists, otherwise while the model trains; the steps are the
same. Memory: one block of hashes, the held-out examples, and a byte for each row while rows are held out.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamahome.config.schema import DataConfig
from llamahome.data.content import Content, content_of
from llamahome.data.files.sources import Source, open_source
from llamahome.data.files.splits import Wanted, evaluation_paths, to_evaluate, to_measure, to_train
from llamahome.data.records import Row
from llamahome.data.report import SAME_COUNTS, DataReport
from llamahome.data.rows.detect import SAMPLE, DetectedFormat, detect
from llamahome.data.rows.file_formats import MOST_FILES, ROWS_OF_FILE, refuse_mixed_files
from llamahome.data.rows.formats import OWN_NAMES, Names
from llamahome.data.rows.markup import markup_note
from llamahome.data.rows.rendered import rendered_note
from llamahome.data.split_overlap import overlap, overlaps_apart
from llamahome.data.steps.holdout import count_duplicates, held_out
from llamahome.data.steps.mixture import RowOrder, order_of
from llamahome.data.store.counts import SHOWN, Counts, allowed_bad, refuse_bad_rows, require_targets
from llamahome.data.store.kept import all_rows, kept_rows
from llamahome.data.store.row_reader import RowReader
from llamahome.data.store.shards import MERGED, Task, what_decides
from llamahome.data.store.streaming import StreamedExamples
from llamahome.data.store.table import ExampleTable, join
from llamahome.data.text.end_tokens import notes_of
from llamahome.data.text.tokens import ChatTokenizer, require_chat_template
from llamahome.errors import DataError, Problem
from llamahome.rundir import PROCESSED_DATA
from llamahome.units import many

_SAMPLED_ROWS = 256
"""Rows of a stream that are read before training, to measure their length and to find what is wrong with all rows."""
_MEASURED_ROWS = 64
_TOGETHER = 512
_MANY_HELD = 10_000

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """What a run trains and evaluates on. The caller closes it."""

    examples: ExampleTable | StreamedExamples
    """The examples of any row of the source."""
    order: RowOrder
    evaluation: ExampleTable | None
    """None if nothing is held out."""
    evaluation_hashes: NDArray[np.uint64]
    """Hashes of the rows of `evaluation`."""
    report: DataReport
    fingerprint: str
    """Equal if the same rows become the same examples in the same order, wherever the files are, prepared or streamed."""
    reading: RowReader
    folder: Path | None
    """Where the store is; None for a stream."""

    @property
    def streams(self) -> bool:
        """Whether rows are tokenized while the model trains."""
        return isinstance(self.examples, StreamedExamples)

    def judge(self, seen: Counts) -> None:
        """Raise DataError if more rows of a stream were bad than are allowed; a prepared source was checked before training."""
        if isinstance(self.examples, StreamedExamples) and seen.bad > allowed_bad(self.reading.data, self.order.epoch_rows):
            refuse_bad_rows(self.reading.data, self.reading.opened[0], replace(seen, problems=self.examples.problems()))

    def places(self, rows: Sequence[int]) -> list[str]:
        """file:line of these rows of the source."""
        return [str(self.reading.source.parsed(row).where) for row in rows]

    def first_examples(self, count: int) -> ExampleTable:
        """At least the first `count` examples to train on, if the first rows have so many."""
        return self.examples.examples_of(self.order.first_rows(4 * count))

    def content(self) -> Content:
        """Of an average row to train on, from up to 256 rows from everywhere: the same whether they are streamed or not."""
        rows = min(_SAMPLED_ROWS, self.order.epoch_rows)
        return content_of(self.examples.examples_of(self.order.rows_at(np.arange(rows), seed=0)))

    def as_references(self) -> "Prepared":
        """The same, reported for an objective that learns from answers of the model."""
        return replace(self, report=self.report.as_references())

    def close(self) -> None:
        """Stop the workers and close the files; may be called twice."""
        if isinstance(self.examples, StreamedExamples):
            self.examples.close()
        self.reading.source.close()


@dataclass(frozen=True)
class StoredExamples:
    """Every row of a source, tokenized."""

    reading: RowReader
    detected: DetectedFormat
    table: ExampleTable
    counts: Counts
    folder: Path | None
    """Where the store is; None if it could not be written."""


def prepare(
    data: DataConfig, paths: str | Sequence[str], tokenizer: ChatTokenizer, *, say: Say, processed: Path = PROCESSED_DATA
) -> Prepared:
    """Read `paths`, and data.eval_path if it is set; raises DataError with all bad rows if there are too many."""
    task, detected = _task(data, paths, tokenizer, processed, wanted=to_train(data), say=say)
    reading = task.reading
    store = kept_rows(task, say=say)
    if store is not None:
        _refuse_unusable(data, reading, store.counts)
    eval_paths, why = evaluation_paths(data, reading.source.located.evaluation)
    if why:
        say(why)
    other = None if eval_paths is None else read_all(data, eval_paths, tokenizer, say=say, processed=processed, wanted=to_evaluate(data))
    hashes = reading.source.hashes()
    share = 0 if other is not None or (detected.name == "prompts" and data.eval_split == "auto") else data.eval_split
    held = np.flatnonzero(held_out(hashes, share))
    order = order_of(reading.source, held, data.mixture)
    examples: ExampleTable | StreamedExamples = StreamedExamples(reading) if store is None else store.table
    if store is None and len(held) > _MANY_HELD:
        say(f"tokenizing {len(held):,} held-out rows before training")
    try:
        evaluation = _of_rows(examples, held) if other is None else other.table
        counts = store.counts if store is not None else _sampled(data, examples, order)
    except BaseException:
        if isinstance(examples, StreamedExamples):
            examples.close()
        raise
    report = _report(reading, detected, counts, duplicates=count_duplicates(hashes))
    if store is None:
        report = replace(report, sampled_rows=counts.rows, train_examples=order.epoch_rows)
    report = replace(report, epoch_rows=order.epoch_rows, mixture=order.told())
    if other is not None:
        shared = overlap(reading.source, hashes, other.reading.source)
        report = report.with_other(_report(other.reading, other.detected, other.counts))
        report = replace(report, shared_with_eval=shared.count, shared_example=shared.example)
    elif len(evaluation):
        report = report.with_held_out(len(evaluation), rows=int(np.count_nonzero(np.diff(evaluation.firsts))))
        if not report.train_examples:
            require_targets(data, reading.opened[0], replace(counts, kept=0))
    report = replace(report, shared_apart=tuple(sentence for _, sentence in overlaps_apart(reading.source, hashes)))
    return Prepared(
        examples=examples,
        order=order,
        evaluation=evaluation if len(evaluation) else None,
        evaluation_hashes=hashes[held] if other is None else other.reading.source.hashes(),
        report=report,
        fingerprint=_fingerprint(reading, hashes, share),
        reading=reading,
        folder=store.folder if store is not None else None,
    )


def read_all(
    data: DataConfig,
    paths: str | Sequence[str],
    tokenizer: ChatTokenizer,
    *,
    say: Say,
    processed: Path = PROCESSED_DATA,
    wanted: Wanted | None = None,
) -> StoredExamples:
    """Every row of `paths`, none held out, from the store, which is made if it does not exist. Raises DataError.

    Without `wanted`, data with splits is read as for measuring a finished model.
    """
    task, detected = _task(data, paths, tokenizer, processed, wanted=wanted or to_measure(data), say=say)
    kept = all_rows(task, say=say)
    _refuse_unusable(data, task.reading, kept.counts)
    return StoredExamples(task.reading, detected, kept.table, kept.counts, kept.folder)


def report_of(whole: StoredExamples) -> DataReport:
    """What became of every row."""
    return _report(whole.reading, whole.detected, whole.counts, duplicates=count_duplicates(whole.reading.source.hashes()))


def first_format(source: Source, format_setting: str, names: Names = OWN_NAMES) -> DetectedFormat:
    """The format of the first rows that are JSON objects; raises DataError if there are none, or if it cannot be determined."""
    sample = [source.parsed(number) for number in range(min(SAMPLE, len(source)))]
    rows = [row for row in sample if isinstance(row, Row)]
    if not rows:
        raise DataError([row for row in sample if isinstance(row, Problem)][:SHOWN])
    if format_setting == "auto":
        refuse_mixed_files(source.beginnings(files=MOST_FILES, rows=ROWS_OF_FILE), names)
    return detect(rows, format_setting, names)


def _task(
    data: DataConfig, paths: str | Sequence[str], tokenizer: ChatTokenizer, processed: Path, *, wanted: Wanted, say: Say
) -> tuple[Task, DetectedFormat]:
    """Open the source, detect its format from the first rows, and estimate its text from some rows from everywhere."""
    opened = (paths,) if isinstance(paths, str) else tuple(paths)
    source = open_source(opened, say=say, wanted=wanted)
    detected = first_format(source, data.format, data.columns)
    if detected.name != "text":
        require_chat_template(tokenizer, what=f"the rows are chats ({detected.name})")
    say(f"{' '.join(opened)}: {many(len(source), 'row')}, format {detected.name} ({detected.reason})")
    measured = [source.parsed(int(number)) for number in np.linspace(0, len(source) - 1, min(_MEASURED_ROWS, len(source)))]
    if detected.name == "text":
        for note in filter(None, (rendered_note(measured, data.columns), markup_note(measured, data.columns))):
            say(note)
    mean = sum(len(str(row.value)) for row in measured if isinstance(row, Row)) / len(measured)
    return Task(RowReader(opened, source, data, detected.name, tokenizer), processed, mean * len(source)), detected


def _refuse_unusable(data: DataConfig, reading: RowReader, counts: Counts) -> None:
    """DataError if too many rows are bad, too many tokens are cut off, or nothing is learned."""
    refuse_bad_rows(data, reading.opened[0], counts)
    require_targets(data, reading.opened[0], counts)
    too_much = counts.losses.judge(data, reading.opened[0])
    if too_much is not None:
        raise DataError(too_much)


def _of_rows(examples: ExampleTable | StreamedExamples, rows: NDArray[np.int64]) -> ExampleTable:
    return join([examples.examples_of(rows[begin : begin + _TOGETHER]) for begin in range(0, max(1, len(rows)), _TOGETHER)])


def _sampled(data: DataConfig, stream: ExampleTable | StreamedExamples, order: RowOrder) -> Counts:
    """Read the rows at some positions of a stream, so that what is wrong with all rows shows before training."""
    assert isinstance(stream, StreamedExamples)
    _, counts = stream.read(order.rows_at(np.arange(min(_SAMPLED_ROWS, order.epoch_rows)), seed=0))
    require_targets(data, stream.reading.opened[0], counts)
    too_much = counts.losses.judge(data, stream.reading.opened[0])
    if too_much is not None:
        raise DataError(replace(too_much, message=f"of {counts.rows:,} rows from everywhere, {too_much.message}"))
    return counts


def _fingerprint(reading: RowReader, hashes: NDArray[np.uint64], held: float | str) -> str:
    data = reading.data
    digest = hashlib.sha256()
    for begin in range(0, len(hashes), 1 << 20):
        digest.update(hashes[begin : begin + (1 << 20)].astype("<u8", copy=False).tobytes())
    decides = {key: value for key, value in what_decides(reading).items() if key != MERGED}  # does not change rows without a system text
    content: dict[str, Any] = {**decides, "held": held, "mixture": data.mixture, "rows": digest.hexdigest()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _report(reading: RowReader, detected: DetectedFormat, counts: Counts, *, duplicates: int = 0) -> DataReport:
    return DataReport(
        format=detected.name,
        reason=detected.reason,
        files=len(reading.source.paths),
        rows=len(reading.source),
        train_examples=counts.examples,
        eval_examples=0,
        eval_rows=0,
        overlong_truncated=counts.truncated,
        overlong_dropped=counts.dropped,
        longest_tokens=counts.losses.longest_tokens,
        longest_where=counts.losses.longest_where,
        duplicates=duplicates,
        ignored_files=reading.source.ignored,
        **{name: getattr(counts, name) for name in SAME_COUNTS},
        notes=notes_of(reading.tokenizer, chats=detected.name != "text"),
    )
