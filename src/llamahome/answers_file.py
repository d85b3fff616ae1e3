"""Writes the answers of a model beside those of its base, one row after the other: JSONL, Markdown, CSV or HTML by the ending of the name.

The file is written aside and renamed, and never replaces another.
"""

import csv
import html
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamahome.errors import ConfigError, MachineError, Problem
from llamahome.rundir import as_typed, free_beside

ENDINGS = (".jsonl", ".md", ".csv", ".html")
_STYLE = (
    "body{font:15px sans-serif;margin:2em}td,th{border:1px solid #bbb;padding:.5em;vertical-align:top}pre{white-space:pre-wrap;margin:0}"
)


def check_answers_path(path: Path) -> None:
    """Raise ConfigError if `path` is there already or has an ending that is not known, MachineError if it cannot be written."""
    if path.suffix.lower() not in ENDINGS:
        message = f"a file of answers ends in {', '.join(ENDINGS)}"
        hint = f"--answers {as_typed(path.with_suffix('.jsonl'))}"
        raise ConfigError(Problem(code="evaluation.answers-ending", message=message, where=str(path), hint=hint))
    if path.exists():
        hint = f"--answers {free_beside(path)}{path.suffix if path.is_file() else ''}"
        raise ConfigError(Problem(code="evaluation.answers-exist", message="there is a file already", where=str(path), hint=hint))
    existing = next(each for each in path.absolute().parents if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise MachineError(_unwritable(path, f"{existing} is no folder that you may write to"))


def default_answers_path(run: Path, data_paths: Sequence[str]) -> Path:
    """`answers/<name of the data>.jsonl` in the folder of the run; -2, -3, ... if it is there."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data_paths[0]).name.split(".")[0]).strip("-.") or "rows"
    path = run / "answers" / f"{name}.jsonl"
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{name}-{number}.jsonl")
    return path


def write_answers(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the file of answers. Raises MachineError if it cannot be written."""
    text = {".jsonl": _jsonl, ".md": _markdown, ".csv": _csv, ".html": _html}[path.suffix.lower()](rows)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(text.encode("utf-8", "backslashreplace"))
        os.link(aside, path)
    except OSError as error:
        raise MachineError(_unwritable(path, error.strerror or str(error))) from error
    finally:
        aside.unlink(missing_ok=True)


def _unwritable(path: Path, why: str) -> Problem:
    message = f"cannot write the answers: {why}"
    return Problem(code="machine.cannot-write", message=message, where=str(path))


def _jsonl(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _texts(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The texts of a row under their headings."""
    named = (("prompt", "Prompt"), ("reference", "Reference"), ("answer", "Answer"), ("base_answer", "Answer of the base"))
    return [(title, row[key]) for key, title in named if key in row]


def _scores(row: dict[str, Any]) -> list[tuple[str, str]]:
    scores = [(name, f"{value:.4g}") for name, value in row.get("scores", {}).items()]
    return scores + [(f"base {name}", f"{value:.4g}") for name, value in row.get("base_scores", {}).items()]


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    parts = ["# Answers\n"]
    for row in rows:
        parts.append(f"## {row['source']}, row {row['row']}\n")
        for title, text in _texts(row):
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
            parts.append(f"**{title}**\n\n{fence}text\n{text}\n{fence}\n")
        if scores := _scores(row):
            parts.append(", ".join(f"{name} {value}" for name, value in scores) + "\n")
    return "\n".join(parts)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    flat = [{"source": row["source"], "row": row["row"], **dict(_texts(row)), **dict(_scores(row))} for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns)
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _html(rows: Sequence[dict[str, Any]]) -> str:
    parts = [f"<!doctype html><meta charset=utf-8><title>Answers</title><style>{_STYLE}</style><table>"]
    titles = list(dict.fromkeys(title for row in rows for title, _ in _texts(row)))
    parts.append("<tr>" + "".join(f"<th>{title}" for title in ("Row", *titles, "Scores")))
    for row in rows:
        texts, scores = dict(_texts(row)), "\n".join(f"{name} {value}" for name, value in _scores(row))
        cells = [f"{row['source']}, row {row['row']}", *(texts.get(title, "") for title in titles), scores]
        parts.append("<tr>" + "".join(f"<td><pre>{html.escape(cell)}</pre>" for cell in cells))
    return "\n".join([*parts, "</table>", ""])
