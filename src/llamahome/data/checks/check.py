"""Everything that can be wrong with data, in one pass: rows that a run would refuse, and what it would learn from them without wanting to.

Errors are what `train` refuses with the same settings, found by the same functions; warnings are what it does all the same. After the pass
rows are compared by their figures alone: the same again, far too long, in another language, in the evaluation data.
"""

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from llamahome.config.schema import DataConfig
from llamahome.data.checks.compare import Side, compared, nearly_held_out, nearly_shared, shared, shared_apart
from llamahome.data.checks.duplicates import MOST_ROWS, near_known
from llamahome.data.checks.facts import join_facts
from llamahome.data.checks.findings import Found, Tally
from llamahome.data.checks.languages import languages_known
from llamahome.data.checks.losses import Losses, within_positions
from llamahome.data.checks.rowcheck import Scope
from llamahome.data.checks.survey import processes_for, survey
from llamahome.data.files.sources import Source, open_source
from llamahome.data.files.splits import Wanted, evaluation_paths, to_evaluate, to_train
from llamahome.data.prepare import first_format
from llamahome.data.rows.detect import SAMPLE, DetectedFormat
from llamahome.data.steps.holdout import held_out
from llamahome.data.steps.mixture import order_of
from llamahome.data.text.ends import notes_of
from llamahome.data.text.place import TokenizerPlace
from llamahome.data.text.tokens import open_tokenizer, require_chat_template
from llamahome.errors import DataError, Problem
from llamahome.units import many

Tell = Callable[[Found], None]
Watch = Callable[[int, int], None]
"""Takes the rows that are done, and how many there are."""

_COPY = "--fix OUT"
"""In the hint of a warning that --fix does something about; rows with an error it mends or leaves out."""
_QUALITY = "pip install 'llamahome[quality]'"


@dataclass(frozen=True)
class Request:
    """What is to be checked."""

    paths: tuple[str, ...]
    data: DataConfig
    tokenizer: TokenizerPlace | None = None
    """None: tokens are not looked at."""
    near: bool = False
    """Whether near duplicates are looked for; needs datasketch."""
    languages: bool = False
    """Whether languages are told; needs py3langid."""
    processes: int | None = None
    """None: as many as pay."""
    positions: int | None = None
    """Of a model with a table of them, which no max_length can exceed."""
    wanted: Wanted | None = None
    """None: what the settings train on."""


@dataclass
class Checked:
    """What came of it; the findings themselves were told one by one."""

    tally: Tally = field(default_factory=Tally)
    main: Side | None = None
    """None when nothing could be opened."""
    evaluation: Side | None = None
    unsought: list[str] = field(default_factory=list)
    """What was not looked for, and what it takes."""

    def copy_pays(self) -> bool:
        """Whether --fix would write a copy that is better: some row is left or can be mended, and something is wrong that it mends."""
        side = self.main
        if side is None or side.format is None or not (side.facts.usable.any() or side.mendable):
            return False
        ours = [found for found in self.tally.shown() if found.place is None or found.place.source in side.source.paths]
        return any(_COPY in (found.problem.hint or "") or (found.level == "error" and found.place) for found in ours)


def check(request: Request, tell: Tell, *, watch: Watch = lambda done, rows: None) -> Checked:
    """Look at every row; each finding is told as it is found, rows in their order, and `watch` is told how far it is.

    Raises DataError only when a file changes meanwhile.
    """
    checked = Checked()

    def told(found: Found) -> None:
        found = replace(found, problem=within_positions(found.problem, request.positions))
        checked.tally.add(found)
        tell(found)

    checked.unsought = _unsought(request)
    checked.main = look_over(request, told, watch=watch)
    apart, why = (None, "") if checked.main is None else evaluation_paths(request.data, checked.main.source.located.evaluation)
    if checked.main is None and request.data.eval_path is not None:
        apart = (request.data.eval_path,)
    if why and checked.main is not None:
        checked.main.source.tell(why)
    if apart is not None:
        other = replace(request, paths=apart, wanted=to_evaluate(request.data), languages=False)
        checked.evaluation = look_over(other, told, watch=watch)
    for side in (checked.main, checked.evaluation):
        if side is not None:
            for found in compared(side, near=side is checked.main):
                told(found)
            where = ", ".join(request.paths) if side is checked.main else ", ".join(apart or ())
            for problem in _judged(side, where):
                told(Found("error", problem))
    if checked.main is not None:
        for problem in _left_out(checked.main):
            told(Found("error", problem))
        if len(checked.main.facts) > MOST_ROWS and request.near:
            checked.unsought.append(f"near duplicates (only among at most {MOST_ROWS:,} rows)")
        if checked.evaluation is not None:
            for found in (*shared(checked.main, checked.evaluation), *nearly_shared(checked.main, checked.evaluation)):
                told(found)
            if len(checked.evaluation.facts) > MOST_ROWS >= len(checked.main.facts) and request.near:
                checked.unsought.append(f"near duplicates in the evaluation data (only among at most {MOST_ROWS:,} rows)")
        elif apart is None and request.near and len(checked.main.facts) <= MOST_ROWS:
            for found in nearly_held_out(checked.main, held_out(checked.main.source.hashes(), request.data.eval_split)):
                told(found)
        for found in shared_apart(checked.main):
            told(found)
    return checked


def _unsought(request: Request) -> list[str]:
    reasons: dict[str, list[str]] = {}
    sought = (("near duplicates", request.near, near_known()), ("languages", request.languages, languages_known()))
    for what, wanted, known in sought:
        if not wanted:
            reasons.setdefault("--no-quality" if known else _QUALITY, []).append(what)
    if request.tokenizer is None:
        reasons["--no-tokens"] = ["masks, lengths, control tokens"]
    return [f"{', '.join(words)} ({reason})" for reason, words in reasons.items()]


def look_over(request: Request, told: Tell, *, watch: Watch = lambda done, rows: None) -> Side | None:
    """One pass over the rows of `request.paths`; None when there is nothing to pass over."""
    tokenizer = None if request.tokenizer is None else open_tokenizer(request.tokenizer)
    source = open_all(request.paths, told, wanted=request.wanted or to_train(request.data))
    if source is None:
        return None
    for found in _marks(source):
        told(found)
    detected = the_format(source, request.data, told)
    name = detected.name if detected is not None else None
    if tokenizer is not None and name != "text":
        try:
            require_chat_template(tokenizer, what="the rows are chats" + (f" ({name})" if name else ""))
        except DataError as error:
            told(Found("error", error.problems[0]))
            tokenizer = None
    place = request.tokenizer if tokenizer is not None else None
    near = request.near and len(source) <= MOST_ROWS
    scope = Scope(source.paths, request.data, name, place, near=near, languages=request.languages)
    processes = request.processes or processes_for(source.paths, tokens=place is not None)
    parts, done, losses, mendable = [], 0, Losses(), 0
    for looked in survey(scope, source, tokenizer, processes=processes):
        parts.append(looked.facts)
        losses.merge(looked.losses)
        mendable += looked.mendable
        done += len(looked.facts)
        watch(done, len(source))
        for found in looked.findings:
            told(found)
    notes = () if tokenizer is None or name is None else notes_of(tokenizer, chats=name != "text")
    return Side(
        source,
        request.data,
        name,
        join_facts(parts),
        losses,
        tokens=place is not None,
        mendable=mendable,
        notes=notes,
        reason=detected.reason if detected else "",
    )


def open_all(paths: tuple[str, ...], told: Tell, *, wanted: Wanted) -> Source | None:
    """The source of all these paths; what cannot be opened is told, and the rest is read without it."""
    try:
        return open_source(paths[0] if len(paths) == 1 else paths, wanted=wanted)
    except DataError as error:
        problems = list(error.problems)
    good = []
    for path in paths if len(paths) > 1 else ():
        try:
            open_source(path, wanted=wanted).close()
        except DataError as error:
            problems += [problem for problem in error.problems if problem not in problems]
        else:
            good.append(path)
    for problem in problems:
        told(Found("error", problem))
    return open_source(good, wanted=wanted) if good and len(good) < len(paths) else None


def the_format(source: Source, data: DataConfig, told: Tell) -> DetectedFormat | None:
    """The format that a run would find; None when it would find none, which is told unless single rows are to blame."""
    try:
        return first_format(source, data.format, data.columns)
    except DataError as error:
        rows = set(_first_problems(source))
        problems = [problem for problem in error.problems if problem not in rows]
        if not problems and data.on_bad_row == "skip":  # as an error the rows speak for themselves
            message = f"not one of the first {len(rows):,} rows can be read, so there is no telling their format"
            hint = "mend them, or take them out of the file"
            problems = [Problem(code="data.bad-rows", message=message, where=source.paths[0], hint=hint)]
        for problem in problems:
            told(Found("error", problem))
    return None


def _first_problems(source: Source) -> Iterator[Problem]:
    """What is wrong with the rows that a format is found from; the pass over all rows tells it."""
    for number in range(min(SAMPLE, len(source))):
        parsed = source.parsed(number)
        if isinstance(parsed, Problem):
            yield parsed


def _marks(source: Source) -> Iterator[Found]:
    for path in source.paths:
        if marked(path):
            message = "the file begins with a byte order mark, which is no part of the first row and is skipped"
            hint = "--fix OUT writes a copy without it"
            yield Found("warning", Problem(code="data.byte-order-mark", message=message, where=f"{path}:1", hint=hint))


def marked(path: str) -> bool:
    """Whether the file begins with a byte order mark; binary kinds never do."""
    with Path(path).open("rb") as file:
        return file.read(3) == codecs.BOM_UTF8


def _left_out(side: Side) -> Iterator[Problem]:
    """Why data.mixture leaves nothing to train on; raises ConfigError for names that mean none of the files, as a run does."""
    if not side.data.mixture:
        return
    share = side.data.eval_split if evaluation_paths(side.data, side.source.located.evaluation)[0] is None else 0
    try:
        order_of(side.source, np.flatnonzero(held_out(side.source.hashes(), share)), side.data.mixture)
    except DataError as error:
        yield from error.problems


def _judged(side: Side, where: str) -> Iterator[Problem]:
    """Why a run would refuse rows that it could take one by one: too many are bad, or nothing in them is learned."""
    data = side.data
    rows, bad = len(side.facts), len(side.facts) - int(side.facts.usable.sum())
    if side.format is None or (bad and data.on_bad_row == "error"):
        return
    if bad > data.max_bad_share * rows + 1e-9:
        message = f"{bad:,} of {many(rows, 'row')} cannot be used; data.max_bad_share allows {data.max_bad_share:g}"
        hint = f"mend them, or --set data.max_bad_share={min(np.ceil(bad / rows * 1e4) / 1e4, 0.9999):g}"
        yield Problem(code="data.bad-rows", message=message, where=where, hint=hint)
    elif side.tokens and not side.facts.kept_targets.any():
        longest = int(side.facts.tokens.max())
        message = f"nothing is left to learn: data.max_length {data.max_length:,} cuts every answer off"
        yield Problem(
            code="data.no-targets", message=message, where=where, hint=f"--set data.max_length={longest} keeps all of the longest row"
        )
    elif (lost := side.losses.judge(data, where)) is not None:
        yield lost
