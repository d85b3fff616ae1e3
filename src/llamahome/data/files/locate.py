"""Finds the files that typed paths mean: files, folders, globs and hub data sets, one or several.

A path that does not exist is answered with the nearest name that does; a file that cannot be read with a command that converts it.
"""

import difflib
import glob
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamahome.data.files.commands import ROWS_OF_SHEET, is_row, run_python
from llamahome.data.files.guarded_file import unreadable
from llamahome.data.files.hub import fetch, is_hub_id
from llamahome.data.files.index import Notify
from llamahome.data.files.jsontext import json_or_none
from llamahome.data.files.kinds import ENDINGS, ending, holds_rows, is_read, is_text
from llamahome.data.files.signatures import conversion_by_content, wrong_archive
from llamahome.data.files.split_files import DESCRIBING, find_splits, missing_parts
from llamahome.data.files.splits import TO_TRAIN, Choice, Wanted, choose, require_splits
from llamahome.data.sample import FILE_NAME
from llamahome.errors import DataError, Problem
from llamahome.hub_cache import snapshot_in
from llamahome.lfs import is_pointer, lfs_problem
from llamahome.progress_marks import marks
from llamahome.rundir import RAW_DATA

_UNPACK = {
    ".tar": "tar -xf {}",
    ".tgz": "tar -xf {}",
    ".bz2": "bunzip2 --keep {}",
    ".xz": "xz --decompress --keep {}",
}
_SMALL = 1 << 20


@dataclass(frozen=True)
class Located:
    """The files that paths mean."""

    files: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    """Files among them that are not read."""
    evaluation: tuple[str, ...] = ()
    """Files of a validation split beside the split that is read."""
    apart: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Other splits with their files, which are left alone."""
    has_splits: bool = False


def locate(paths: str | Sequence[str], *, say: Callable[[str], None] | None = None, wanted: Wanted = TO_TRAIN) -> Located:
    """The files that the paths mean, in their order, those of a folder or glob sorted; raises DataError with all that is wrong."""
    notify: Notify = say or (lambda _: None)
    located: list[Located] = []
    problems: list[Problem] = []
    typed = (paths,) if isinstance(paths, str) else tuple(paths)
    for path in typed:
        try:
            located.append(_locate_one(path, notify, wanted))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    if not any(each.has_splits for each in located):
        require_splits(wanted, typed)
    return _joined(located, notify)


def _joined(located: Sequence[Located], notify: Notify) -> Located:
    """All of them together, each file once, because rows must not count twice if two patterns overlap."""
    files: dict[str, str] = {}
    for path in (path for each in located for path in each.files):
        real = os.path.realpath(path)
        if real in files:
            notify(f"{path} is named twice and read once")
        files.setdefault(real, path)
    read = tuple(files.values())
    evaluation = tuple(dict.fromkeys(path for each in located for path in each.evaluation if path not in read))
    ignored = tuple(dict.fromkeys(path for each in located for path in each.ignored))
    apart = tuple(split for each in located for split in each.apart)
    return Located(read, ignored, evaluation, apart, any(each.has_splits for each in located))


def _locate_one(path: str, notify: Notify, wanted: Wanted) -> Located:
    place = Path(path)
    if not path.strip():
        raise DataError(Problem(code="data.not-found", message="the path of the data is empty", hint=_sample()))
    if place.is_dir():
        return _folder(path, notify, wanted)
    if place.exists():
        _refuse_unsupported([path])
        return Located((path,))
    if place.is_symlink():
        target = Path(os.path.realpath(path))
        message, hint = f"the link points to {target}, which does not exist", _neighbours(target.parent, target.name)
        raise DataError(Problem(code="data.not-found", message=message, where=path, hint=hint))
    if glob.has_magic(path):
        matches = sorted(str(match) for match in Path(place.anchor).glob(str(place.relative_to(place.anchor))))
        files = tuple(match for match in matches if not Path(match).is_dir())
        _refuse_unsupported(files)
        if files:
            return _joined([Located(files)], notify)
        if matches:
            return _joined([_folder(match, notify, wanted) for match in matches], notify)
    elif is_hub_id(path):
        choice = fetch(path, notify, wanted)
        if choice.note:
            notify(choice.note)
        return Located(choice.files, (), choice.evaluation, choice.apart, has_splits=True)
    raise DataError(_not_found(path))


def _folder(path: str, notify: Notify, wanted: Wanted) -> Located:
    """The files below that hold rows of the wanted split; text only if there is nothing else, because a README is not a row."""
    if (snapshot := snapshot_in(Path(path))) is not None:
        notify(f"{path} is the hub's cache of a data set, of which {snapshot.name[:12]} is read")
        path = str(snapshot)
    below = sorted(_below(path))
    visible = [name for name in below if not Path(name).name.startswith(".")]
    rows = [name for name in visible if ending(name) and is_read(name) and Path(name).is_file() and holds_rows(name)]
    files = [name for name in rows if not is_text(name)] or rows
    if not files:
        raise DataError(_empty_folder(path, visible))
    layout, files_of_rows = find_splits(path, files)
    choice = choose(path, layout, files_of_rows, wanted)
    has_splits, choice = choice is not None, choice or Choice(files_of_rows)
    for note in filter(None, (choice.note, *missing_parts((*choice.files, *choice.evaluation)))):
        notify(note)
    known = {*choice.files, *choice.evaluation, *(name for _, names in choice.apart for name in names)}
    ignored = [name for name in below if name not in known and (name in visible or _looks_like_data(name))]
    if has_splits:
        ignored = [name for name in ignored if Path(name).name not in DESCRIBING]
    return Located(choice.files, tuple(ignored), choice.evaluation, choice.apart, has_splits)


def _empty_folder(path: str, names: Sequence[str]) -> Problem:
    message, hint = "the folder is empty", f"llamahome data sample {shlex.quote(path)}"
    if not names:
        return Problem(code="data.empty-folder", message=message, where=path, hint=hint)
    shown = ", ".join(os.path.relpath(name, path) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    message = f"the folder holds no data file; it holds {shown}"
    if len(json_names := [name for name in names if ending(name) == ".json"]) > 1 and is_row(_read_json(json_names[0])):
        message = f"the folder holds {len(json_names):,} files of one object over several lines, for example {Path(json_names[0]).name}"
        command = f"cat {shlex.quote(path)}/*.json | jq -c . > {shlex.quote(path.rstrip('/') + '.jsonl')}"
        return Problem(code="data.empty-folder", message=message, where=path, hint=command)
    return Problem(code="data.empty-folder", message=message, where=path, hint=_conversion(names[0]))


def _read_json(path: str) -> object:
    """The value in a small file; None if it is not JSON."""
    try:
        return json_or_none(Path(path).read_bytes()) if Path(path).stat().st_size < _SMALL else None
    except OSError:
        return None


def _below(path: str) -> Iterator[str]:
    """Every file under the folder, also through links, each real folder once."""

    def fail(error: OSError) -> None:
        raise DataError(unreadable(str(error.filename or path), error, what="folder")) from error

    walked: set[str] = set()
    for folder, folders, names in os.walk(path, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        folders[:] = [] if real in walked else [name for name in folders if not name.startswith(".")]
        if real not in walked:
            marks.advance()
            walked.add(real)
            yield from (str(Path(folder) / name) for name in names)


def _looks_like_data(name: str) -> bool:
    return ending(name) in ENDINGS


def _refuse_unsupported(paths: Sequence[str]) -> None:
    """DataError with every file whose kind is not read."""
    problems = []
    for path in paths:
        if Path(path).exists() and not Path(path).is_file():
            message, hint = "this is not a regular file", f"cat {shlex.quote(path)} > rows.jsonl"
            problems.append(Problem(code="data.unsupported-file", message=message, where=path, hint=hint))
        elif not is_read(path):
            problems.append(_unsupported(path))
    if problems:
        raise DataError(problems)


def _unsupported(path: str) -> Problem:
    """The problem of a file whose kind is not read, or that is not even of that kind."""
    suffix = ending(path)
    if is_pointer(path):
        return lfs_problem(path)
    message, hint = f"{suffix} files are not read; {', '.join(ENDINGS)} are, also with .gz or .zst", _conversion(path)
    if (wrong := wrong_archive(path, suffix)) is not None:
        message, hint = wrong
    return Problem(code="data.unsupported-file", message=message, where=path, hint=hint)


def _conversion(path: str) -> str | None:
    """A command that makes a readable file of this one; None if its content suggests none."""
    suffix = ending(path)
    if suffix in _UNPACK:
        return _UNPACK[suffix].format(shlex.quote(path))
    if suffix == ".xlsx":
        return run_python(ROWS_OF_SHEET, path, output=Path(path).with_suffix(".jsonl"))
    return conversion_by_content(path)


def _not_found(path: str) -> Problem:
    """The problem of a path that does not exist, with the nearest that does."""
    place = Path(path)
    if glob.has_magic(path):
        while glob.has_magic(str(place)) or not (place.is_dir() or place == place.parent):
            place = place.parent
        return Problem(code="data.not-found", message="no file matches this pattern", where=path, hint=_neighbours(place, ""))
    while not place.parent.is_dir():
        place = place.parent
    message = "there is no such file or folder" if place == Path(path) else f"there is no folder {place}"
    return Problem(code="data.not-found", message=message, where=path, hint=_neighbours(place.parent, place.name))


def _neighbours(folder: Path, name: str) -> str:
    """The nearest name in the folder, its data files, or else the sample data."""
    try:
        entries = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        entries = []
    near = difflib.get_close_matches(name, entries, n=1, cutoff=0.6) if name else []
    if near:
        return f"the nearest name there is {folder / near[0]}"
    data = [entry for entry in entries if _looks_like_data(entry)]
    return f"{folder} holds {', '.join(data[:5])}" if data else _sample()


def _sample() -> str:
    rows = RAW_DATA / FILE_NAME
    return f"{rows} is there" if rows.is_file() else f"llamahome data sample   writes rows to begin with into {rows}"
