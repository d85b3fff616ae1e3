"""Finds everything that is wrong with data in one pass over the rows: `data check`.

Errors are what `train` refuses with the same settings, found by the same functions; warnings are about rows that it accepts. After the pass
the rows are compared with each other by the numbers that were kept of them: duplicates, outliers, languages, evaluation data.
"""

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from llamahome.config.schema import DataConfig
from llamahome.data.checks.answer_quality import languages_known
from llamahome.data.checks.compare import Side, compare_rows, nearly_held_out, nearly_shared, shared, shared_with_splits
from llamahome.data.checks.duplicates import MOST_ROWS
from llamahome.data.checks.findings import Found, Tally
from llamahome.data.checks.row_sizes import join_sizes
from llamahome.data.checks.rowcheck import CheckScope
from llamahome.data.checks.scan import BLOCK_ROWS, processes_for, scan
from llamahome.data.files.sources import Source, open_source
from llamahome.data.files.splits import Wanted, evaluation_paths, to_evaluate, to_train
from llamahome.data.files.spool import content_place
from llamahome.data.prepare import first_format
from llamahome.data.rows.detect import SAMPLE, DetectedFormat
from llamahome.data.steps.holdout import held_out
from llamahome.data.steps.mixture import order_of
from llamahome.data.store.truncation import Truncation, within_positions
from llamahome.data.text.end_tokens import notes_of
from llamahome.data.text.tokenizer_files import TokenizerSource
from llamahome.data.text.tokens import open_tokenizer, require_chat_template
from llamahome.errors import DataError, Problem
from llamahome.units import many

Report = Callable[[Found], None]
"""Called with each finding."""
Watch = Callable[[int, int], None]
"""Called with the number of checked rows and of all rows."""

_FIX_OPTION = "--fix OUT"
"""In the hint of warnings that --fix acts on. It repairs or leaves out all rows with an error."""
_INSTALL_QUALITY = "pip install 'llamahome[quality]'"


@dataclass(frozen=True)
class Request:
    """What to check."""

    paths: tuple[str, ...]
    data: DataConfig
    tokenizer: TokenizerSource | None = None
    """None: rows are not tokenized."""
    near: bool = False
    """Whether to search for near duplicates."""
    languages: bool = False
    """Whether to identify languages; needs py3langid."""
    processes: int | None = None
    """None: as many as save time."""
    learned: bool = True
    """Whether the answers in the rows are learned; otherwise they are references."""
    positions: int | None = None
    """The length of the model's table of positions, if it has one: no max_length can exceed it."""
    wanted: Wanted | None = None
    """Which splits to read; None: those that the settings train on."""
    block_rows: int = BLOCK_ROWS
    """Rows that one process checks together."""


@dataclass
class Checked:
    """The result of a check; the findings were reported one by one."""

    tally: Tally = field(default_factory=Tally)
    main: Side | None = None
    """None if nothing could be opened."""
    evaluation: Side | None = None
    unsought: list[str] = field(default_factory=list)
    """What was not searched for, and what is needed for it."""

    def copy_pays(self) -> bool:
        """Whether --fix would write a better copy: some row is usable or can be repaired, and --fix acts on some finding."""
        side = self.main
        if side is None or side.format is None or not (side.facts.usable.any() or side.repairable):
            return False
        findings = [found for found in self.tally.shown() if found.place is None or found.place.source in side.source.paths]
        return any(_FIX_OPTION in (found.problem.hint or "") or (found.level == "error" and found.place) for found in findings)


def check(request: Request, report: Report, *, watch: Watch = lambda done, rows: None) -> Checked:
    """Check every row. Findings are reported as they are found, in the order of the rows; `watch` is called with the progress.

    Raises DataError only if a file changes during the check.
    """
    checked = Checked()

    def count_and_report(found: Found) -> None:
        found = replace(found, problem=within_positions(found.problem, request.positions))
        checked.tally.add(found)
        report(found)

    checked.unsought = _unsought(request)
    checked.main = look_over(request, count_and_report, watch=watch)
    eval_paths, why = (None, "") if checked.main is None else evaluation_paths(request.data, checked.main.source.located.evaluation)
    if checked.main is None and request.data.eval_path is not None:
        eval_paths = (request.data.eval_path,)
    if why and checked.main is not None:
        checked.main.source.tell(why)
    if eval_paths is not None:
        other = replace(request, paths=eval_paths, wanted=to_evaluate(request.data), languages=False)
        checked.evaluation = look_over(other, count_and_report, watch=watch)
    for side in (checked.main, checked.evaluation):
        if side is not None:
            for found in compare_rows(side, near=side is checked.main):
                count_and_report(found)
            where = ", ".join(request.paths) if side is checked.main else ", ".join(eval_paths or ())
            for problem in _refusals(side, where):
                count_and_report(Found("error", problem))
    if checked.main is not None:
        for problem in _mixture_problems(checked.main):
            count_and_report(Found("error", problem))
        if len(checked.main.facts) > MOST_ROWS and request.near:
            checked.unsought.append(f"near duplicates (only among at most {MOST_ROWS:,} rows)")
        if checked.evaluation is not None:
            for found in (*shared(checked.main, checked.evaluation), *nearly_shared(checked.main, checked.evaluation)):
                count_and_report(found)
            if len(checked.evaluation.facts) > MOST_ROWS >= len(checked.main.facts) and request.near:
                checked.unsought.append(f"near duplicates in the evaluation data (only among at most {MOST_ROWS:,} rows)")
        elif eval_paths is None and request.near and len(checked.main.facts) <= MOST_ROWS:
            for found in nearly_held_out(checked.main, held_out(checked.main.source.hashes(), request.data.eval_split)):
                count_and_report(found)
        for found in shared_with_splits(checked.main):
            count_and_report(found)
    return checked


def _unsought(request: Request) -> list[str]:
    reasons: dict[str, list[str]] = {}
    sought = (("near duplicates", request.near, True), ("languages", request.languages, languages_known()))
    for what, wanted, known in sought:
        if not wanted:
            reasons.setdefault("--no-quality" if known else _INSTALL_QUALITY, []).append(what)
    if request.tokenizer is None:
        reasons["--no-tokens"] = ["masks, lengths, control tokens"]
    return [f"{', '.join(words)} ({reason})" for reason, words in reasons.items()]


def look_over(request: Request, report: Report, *, watch: Watch = lambda done, rows: None) -> Side | None:
    """Check the rows of `request.paths` one by one; None if none of the paths can be opened."""
    tokenizer = None if request.tokenizer is None else open_tokenizer(request.tokenizer)
    source = open_all(request.paths, report, wanted=request.wanted or to_train(request.data))
    if source is None:
        return None
    for found in _byte_order_marks(source):
        report(found)
    detected = detect_format(source, request.data, report)
    name = detected.name if detected is not None else None
    if tokenizer is not None and name != "text":
        try:
            require_chat_template(tokenizer, what="the rows are chats" + (f" ({name})" if name else ""))
        except DataError as error:
            report(Found("error", error.problems[0]))
            tokenizer = None
    place = request.tokenizer if tokenizer is not None else None
    near = request.near and len(source) <= MOST_ROWS
    scope = CheckScope(source.paths, request.data, name, place, near=near, languages=request.languages, learned=request.learned)
    processes = request.processes or processes_for(source.paths, tokens=place is not None)
    parts, done, losses, repairable = [], 0, Truncation(), 0
    for block in scan(scope, source, tokenizer, processes=processes, block_rows=request.block_rows):
        parts.append(block.facts)
        losses.merge(block.losses)
        repairable += block.repairable
        done += len(block.facts)
        watch(done, len(source))
        for found in block.findings:
            report(found)
    notes = () if tokenizer is None or name is None else notes_of(tokenizer, chats=name != "text")
    return Side(
        source,
        request.data,
        name,
        join_sizes(parts),
        losses,
        tokens=place is not None,
        repairable=repairable,
        notes=notes,
        reason=detected.reason if detected else "",
    )


def open_all(paths: tuple[str, ...], report: Report, *, wanted: Wanted) -> Source | None:
    """The source of those paths that can be opened; the problems of the others are reported. None if nothing can be opened."""
    try:
        return open_source(paths[0] if len(paths) == 1 else paths, wanted=wanted)
    except DataError as error:
        problems = list(error.problems)
    readable = []
    for path in paths if len(paths) > 1 else ():
        try:
            open_source(path, wanted=wanted).close()
        except DataError as error:
            problems += [problem for problem in error.problems if problem not in problems]
        else:
            readable.append(path)
    for problem in problems:
        report(Found("error", problem))
    return open_source(readable, wanted=wanted) if readable and len(readable) < len(paths) else None


def detect_format(source: Source, data: DataConfig, report: Report) -> DetectedFormat | None:
    """The format that a run would detect. None if it detects none; that is reported unless single rows are the reason."""
    try:
        return first_format(source, data.format, data.columns)
    except DataError as error:
        rows = set(_first_problems(source))
        problems = [problem for problem in error.problems if problem not in rows]
        if not problems and data.on_bad_row == "skip":  # otherwise each of these rows is an error of its own
            message = f"not one of the first {len(rows):,} rows can be read, so their format cannot be detected"
            hint = "repair them, or remove them from the file"
            problems = [Problem(code="data.bad-rows", message=message, where=source.paths[0], hint=hint)]
        for problem in problems:
            report(Found("error", problem))
    return None


def _first_problems(source: Source) -> Iterator[Problem]:
    """The problems of the rows that the format is detected from, which the pass over all rows reports."""
    for number in range(min(SAMPLE, len(source))):
        parsed = source.parsed(number)
        if isinstance(parsed, Problem):
            yield parsed


def _byte_order_marks(source: Source) -> Iterator[Found]:
    for path in source.paths:
        if has_byte_order_mark(path):
            message = "the file begins with a byte order mark, which is not part of the first row and is skipped"
            hint = "--fix OUT writes a copy without it"
            yield Found("warning", Problem(code="data.byte-order-mark", message=message, where=f"{path}:1", hint=hint))


def has_byte_order_mark(path: str) -> bool:
    """Whether the decompressed file begins with a UTF-8 byte order mark; no binary format does."""
    with Path(content_place(path)).open("rb") as file:
        return file.read(3) == codecs.BOM_UTF8


def _mixture_problems(side: Side) -> Iterator[Problem]:
    """Why data.mixture leaves no row to train on, if it does. Raises ConfigError for names that match no file, as a run does."""
    if not side.data.mixture:
        return
    share = side.data.eval_split if evaluation_paths(side.data, side.source.located.evaluation)[0] is None else 0
    try:
        order_of(side.source, np.flatnonzero(held_out(side.source.hashes(), share)), side.data.mixture)
    except DataError as error:
        yield from error.problems


def _refusals(side: Side, where: str) -> Iterator[Problem]:
    """Why a run would refuse the data as a whole: too many rows are bad, or nothing or too little is learned."""
    data = side.data
    rows, bad = len(side.facts), len(side.facts) - int(side.facts.usable.sum())
    if side.format is None or (bad and data.on_bad_row == "error"):
        return
    if bad > data.max_bad_share * rows + 1e-9:
        message = f"{bad:,} of {many(rows, 'row')} cannot be used; data.max_bad_share allows {data.max_bad_share:g}"
        hint = f"repair them, or --set data.max_bad_share={min(np.ceil(bad / rows * 1e4) / 1e4, 0.9999):g}"
        yield Problem(code="data.bad-rows", message=message, where=where, hint=hint)
    elif side.tokens and not side.facts.kept_targets.any():
        longest = int(side.facts.needed.max())
        message = f"nothing is left to learn: data.max_length {data.max_length:,} cuts every answer off"
        yield Problem(
            code="data.no-targets", message=message, where=where, hint=f"--set data.max_length={longest} keeps all of the longest row"
        )
    elif (lost := side.losses.judge(data, where)) is not None:
        yield lost
