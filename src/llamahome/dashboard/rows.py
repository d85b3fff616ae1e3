"""The rows that a run trains on, as the model sees them: every token marked learned, context, cut or reference.

The data are those that the newest checkpoint of the run names; a request can only choose among their rows. Opening a tokenizer takes a
second or two, so the newest few stay open.
"""

import re
import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from starlette.responses import HTMLResponse

from llamahome.config.load import LoadedConfig
from llamahome.config.objectives import learns_rows
from llamahome.config.schema import DataConfig, ModelConfig
from llamahome.dashboard.lengths import Lengths, lengths_of
from llamahome.dashboard.library import Library
from llamahome.dashboard.pages import Pages, run_frame
from llamahome.data.files.sources import Source, open_source
from llamahome.data.files.splits import to_train
from llamahome.data.text.tokenizer_files import tokenizer_source
from llamahome.data.text.tokens import ChatTokenizer, open_tokenizer
from llamahome.data.view import Kind, Only, view
from llamahome.durable import read_object
from llamahome.errors import LlamaHomeError, Problem
from llamahome.rundir import BASE_MODELS, RunPaths

_ROWS = 3
"""Of a page."""
_MOST_TOKENS = 3000
"""Shown of a row: more is a page that no phone opens."""
_MOST_SEARCHED = 500
"""Rows that a filter looks at for one page."""
_KEPT = 4
FILTERS: tuple[tuple[str, str], ...] = (
    ("", "all rows"),
    ("cut", "rows that lose tokens"),
    ("no-target", "rows of which nothing is learned"),
)


@dataclass(frozen=True)
class _Opened:
    """The rows of a run and how they become tokens."""

    source: Source
    data: DataConfig
    tokenizer: ChatTokenizer
    typed: str
    """The data as one types them."""
    lengths: Lengths
    learned: bool
    """Whether the answers in the rows are learned."""


class RowBrowser:
    """The page of the rows of a run."""

    def __init__(self, library: Library, pages: Pages) -> None:
        self._library, self._pages = library, pages
        self._lock = threading.Lock()
        self._opened: OrderedDict[str, _Opened] = OrderedDict()

    def page(self, paths: RunPaths, asked: Mapping[str, str]) -> HTMLResponse:
        """Some rows: from `row` on, or the row at the place `at` (file:line), or those that a filter (`only`) finds."""
        frame = {**run_frame(self._library, paths, "data"), "filters": FILTERS}
        nothing: dict[str, Any] = {"total": 0, "first": 0, "only": "", "next": None, "before": None, "data": "", "problem": None}
        nothing |= {"rows": [], "lengths": None}
        try:
            with self._lock:  # sources and tokenizers are for one thread
                opened = self._open(paths)
                if opened is None:
                    return self._pages.render("data.html", **frame, **nothing)
                found = self._found(opened, asked)
        except (LlamaHomeError, OSError) as error:
            problem = _said(error.problems[0]) if isinstance(error, LlamaHomeError) else f"the data cannot be read: {error.strerror}"
            return self._pages.render("data.html", **frame, **(nothing | {"problem": problem}))
        return self._pages.render("data.html", **frame, **(nothing | found))

    def _found(self, opened: _Opened, asked: Mapping[str, str]) -> dict[str, Any]:
        total, only = len(opened.source), _only(asked.get("only"))
        wanted = asked.get("row", "")
        first = min(int(wanted), total - 1) if wanted.isascii() and wanted.isdigit() and len(wanted) < 12 else 0
        place, problem = asked.get("at"), None
        if place is not None:
            number = row_at(opened.source, place)
            problem = f"There is no row {place} in these data." if number is None else None
            first = number or 0
        count = 1 if place is not None and problem is None else _ROWS
        rows, after = _rows(opened, first, count, only)
        return {
            "rows": rows,
            "total": total,
            "first": first,
            "only": only or "",
            "next": after if after < total else None,
            "before": max(0, first - _ROWS) if first else None,
            "data": opened.typed,
            "problem": problem,
            "lengths": opened.lengths,
        }

    def _open(self, paths: RunPaths) -> _Opened | None:
        """The rows of a run; None as long as no checkpoint says which data it reads."""
        if paths.run_id in self._opened:
            self._opened.move_to_end(paths.run_id)
            return self._opened[paths.run_id]
        checkpoints = paths.checkpoints()
        extra = read_object(checkpoints[-1][1] / "trainer_state.json").get("extra") if checkpoints else None
        typed = extra.get("data_path") if isinstance(extra, dict) else None
        config = self._library.config(paths)
        if not isinstance(typed, list) or not isinstance(config, LoadedConfig):
            return None
        settings = config.config
        tokenizer = open_tokenizer(tokenizer_source(_model_folder(settings.model, checkpoints[-1][1]), settings.model))
        source = open_source([str(each) for each in typed], wanted=to_train(settings.data))
        learned = learns_rows(settings.training.objective)
        lengths = lengths_of(source, settings.data, tokenizer, learned=learned)
        self._opened[paths.run_id] = _Opened(source, settings.data, tokenizer, ", ".join(map(str, typed)), lengths, learned)
        while len(self._opened) > _KEPT:
            self._opened.popitem(last=False)[1].source.close()
        return self._opened[paths.run_id]


def _model_folder(model: ModelConfig, checkpoint: Path) -> Path:
    """A folder with the tokenizer of the run: that of its checkpoint, or of the base."""
    folders = (checkpoint / "model", Path(model.name).expanduser(), BASE_MODELS / model.name)
    return next((folder for folder in folders if (folder / "tokenizer.json").is_file()), folders[-1])


def _said(problem: Problem) -> str:
    return f"{problem.where}: {problem.message}" if problem.where else problem.message


def _only(text: str | None) -> Only | None:
    return "cut" if text == "cut" else "no-target" if text == "no-target" else None


def _rows(opened: _Opened, first: int, count: int, only: Only | None) -> tuple[list[dict[str, Any]], int]:
    """At most `count` rows from `first` on, and the number of the row after them."""
    total, rows = len(opened.source), []
    end = min(total, first + (_MOST_SEARCHED if only else count))
    number = first
    for number in range(first, end):
        for shown in view(opened.source, [number], opened.data, opened.tokenizer, only=only, learned=opened.learned):
            if isinstance(shown, Problem):
                rows.append({"number": number, "where": shown.where or "", "problem": shown.message, "spans": []})
            else:
                rows.append(tokens_shown(number, shown.row.where, shown.kinds, shown.texts))
        if len(rows) == count:
            break
    return rows, number + 1


def tokens_shown(number: int, where: str, kinds: Sequence[Kind], texts: Sequence[str]) -> dict[str, Any]:
    """A row of a page, with its tokens in spans of one kind."""
    return {
        "number": number,
        "where": where,
        "problem": None,
        "tokens": len(kinds),
        "learned": kinds.count("learned"),
        "cut": kinds.count("cut"),
        "spans": _spans(kinds, texts),
        "hidden": max(0, len(kinds) - _MOST_TOKENS),
    }


def _spans(kinds: Sequence[Kind], shown: Sequence[str]) -> list[tuple[Kind, list[str]]]:
    """Runs of tokens of one kind with the text of each token; at most as many tokens as a page shows."""
    pairs = islice(zip(kinds, shown, strict=True), _MOST_TOKENS)
    return [(kind, [text for _, text in run]) for kind, run in groupby(pairs, itemgetter(0))]


def row_at(source: Source, place: str) -> int | None:
    """The number of the row that errors and events call `place` (file:line); None if there is none. Reads a few rows of the file."""
    path, _, line = place.rpartition(":")
    numbers = range(len(source))
    for index in [index for index, file in enumerate(source.located.files) if str(file) == path]:
        begin = bisect_left(numbers, index, key=source.file_of)
        end = bisect_right(numbers, index, key=source.file_of)
        at = bisect_left(numbers, _line(line), begin, end, key=lambda number: _line(_place(source, number).rpartition(":")[2]))
        if at < end and _place(source, at) == place:
            return at
    return None


def _place(source: Source, number: int) -> str:
    return source.parsed(number).where or ""


def _line(text: str) -> tuple[int, ...]:
    """`17`, `row 17` and `1 (row 17)` as numbers in their order."""
    return tuple(map(int, re.findall(r"\d+", text)))
