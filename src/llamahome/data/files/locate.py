"""What people typed to the files it means: files, folders, globs and hub data sets, one or several.

A path that means nothing is answered with the nearest name that exists; a kind of file that is not read with what turns it into one that
is.
"""

import difflib
import glob
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamahome.data.files.disguise import ROWS_OF_SHEET, readable
from llamahome.data.files.hub import fetch, is_hub_id
from llamahome.data.files.kinds import ENDINGS, ending, holds_rows, is_read, is_text
from llamahome.data.files.layout import DESCRIBING, lay_out
from llamahome.data.files.splits import TO_TRAIN, Choice, Wanted, choose, require_splits
from llamahome.data.files.watch import unreadable
from llamahome.data.sample import FILE_NAME
from llamahome.errors import DataError, Problem
from llamahome.rundir import RAW_DATA


@dataclass(frozen=True)
class Located:
    """What paths mean."""

    files: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    """Files that lie among them and are not read."""
    evaluation: tuple[str, ...] = ()
    """Files of a validation split beside the one that is read."""
    apart: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Other splits with their files, which are left alone."""
    has_splits: bool = False


def locate(paths: str | Sequence[str], *, say: Callable[[str], None] | None = None, wanted: Wanted = TO_TRAIN) -> Located:
    """The files that the path or paths mean, in their order, those of a folder or glob sorted; raises DataError with all that is wrong."""
    tell = say or (lambda _: None)
    located: list[Located] = []
    problems: list[Problem] = []
    typed = (paths,) if isinstance(paths, str) else tuple(paths)
    for path in typed:
        try:
            located.append(_one(path, tell, wanted))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    if not any(found.has_splits for found in located):
        require_splits(wanted, typed)
    return _joined(located, tell)


def _joined(located: Sequence[Located], tell: Callable[[str], None]) -> Located:
    """What all of them mean, each file once."""
    files = tuple(_once([path for found in located for path in found.files], tell))
    evaluation = tuple(path for path in dict.fromkeys(path for found in located for path in found.evaluation) if path not in files)
    ignored = tuple(dict.fromkeys(path for found in located for path in found.ignored))
    apart = tuple(split for found in located for split in found.apart)
    return Located(files, ignored, evaluation, apart, any(found.has_splits for found in located))


def _one(path: str, tell: Callable[[str], None], wanted: Wanted) -> Located:
    place = Path(path)
    if not path.strip():
        raise DataError(Problem(code="data.not-found", message="the path of the data is empty", hint=_sample()))
    if place.is_dir():
        return _folder(path, tell, wanted)
    if place.is_symlink() and not place.exists():
        target = Path(os.path.realpath(path))
        message, hint = f"the link leads to {target}, which is not there", _neighbours(target.parent, target.name)
        raise DataError(Problem(code="data.not-found", message=message, where=path, hint=hint))
    if place.exists():
        _refuse_unsupported([path])
        return Located((path,))
    if glob.has_magic(path):
        found = sorted(str(p) for p in Path(place.anchor).glob(str(place.relative_to(place.anchor))))
        files = [name for name in found if not Path(name).is_dir()]
        _refuse_unsupported(files)
        below = [_folder(name, tell, wanted) for name in found if Path(name).is_dir()] if not files else []
        if files or below:
            return _joined([Located(tuple(files)), *below], tell)
    elif is_hub_id(path):
        return _fetched(path, tell, wanted)
    raise DataError(_not_found(path))


def _fetched(path: str, tell: Callable[[str], None], wanted: Wanted) -> Located:
    found = fetch(path, tell, wanted)
    if found.note:
        tell(found.note)
    return Located(found.files, (), found.evaluation, found.apart, has_splits=True)


def _once(files: list[str], tell: Callable[[str], None]) -> Iterator[str]:
    """Each file once: two patterns that overlap do not mean that rows count twice."""
    seen: set[str] = set()
    for path in files:
        real = os.path.realpath(path)
        if real in seen:
            tell(f"{path} is named twice and read once")
            continue
        seen.add(real)
        yield path


def _folder(path: str, tell: Callable[[str], None], wanted: Wanted) -> Located:
    """The files below that hold rows, of the split that is wanted; text only where there is nothing else, for a README is not a row."""
    below = sorted(_below(path))
    seen = [name for name in below if not _is_hidden(name, path)]
    rows = [name for name in seen if ending(name) and is_read(name) and Path(name).is_file() and holds_rows(name)]
    files = [name for name in rows if not is_text(name)] or rows
    if files:
        layout, files_of_rows = lay_out(path, files)
        choice = choose(path, layout, files_of_rows, wanted)
        found = choice or Choice(files_of_rows)
        if found.note:
            tell(found.note)
        known = {*found.files, *found.evaluation, *(name for _, names in found.apart for name in names)}
        ignored = [name for name in below if name not in known and (name in seen or _looks_like_data(name))]
        if choice is not None:
            ignored = [name for name in ignored if Path(name).name not in DESCRIBING]
        return Located(found.files, tuple(ignored), found.evaluation, found.apart, choice is not None)
    hint: str | None
    if not seen:
        message, hint = "the folder is empty", f"llamahome data sample {shlex.quote(path)}"
    else:
        names = ", ".join(os.path.relpath(name, path) for name in seen[:5]) + (f" and {len(seen) - 5} more" if len(seen) > 5 else "")
        message, hint = f"the folder holds no data file; it holds {names}", _how_to_convert(seen[0])
    raise DataError(Problem(code="data.empty-folder", message=message, where=path, hint=hint))


def _below(path: str) -> Iterator[str]:
    """Every file under the folder, also through links, each real folder once."""

    def fail(error: OSError) -> None:
        raise DataError(unreadable(str(error.filename or path), error, what="folder")) from error

    walked: set[str] = set()
    for folder, folders, names in os.walk(path, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        folders[:] = [] if real in walked else [name for name in folders if not name.startswith(".")]
        if real not in walked:
            walked.add(real)
            yield from (str(Path(folder) / name) for name in names)


def _is_hidden(name: str, folder: str) -> bool:
    return Path(os.path.relpath(name, folder)).name.startswith(".")


def _looks_like_data(name: str) -> bool:
    return ending(name) in ENDINGS


def _refuse_unsupported(paths: Sequence[str]) -> None:
    """DataError with every one of the files that is of no kind that is read."""
    problems = []
    hint: str | None
    for path in paths:
        if Path(path).exists() and not Path(path).is_file():
            message, hint = "this is not a regular file", f"cat {shlex.quote(path)} > rows.jsonl"
        elif not is_read(path):
            message = f"{ending(path)} files are not read; {', '.join(ENDINGS)} are, also with .gz or .zst"
            hint = _how_to_convert(path)
        else:
            continue
        problems.append(Problem(code="data.unsupported-file", message=message, where=path, hint=hint))
    if problems:
        raise DataError(problems)


def _how_to_convert(path: str) -> str | None:
    """A command that makes of the file one that is read; None where its content tells none."""
    suffix, source = ending(path), shlex.quote(path)
    unpack = {".tar": f"tar -xf {source}", ".tgz": f"tar -xf {source}", ".zip": f"unzip {source}", ".bz2": f"bunzip2 --keep {source}"}
    unpack |= {".xz": f"xz --decompress --keep {source}"}
    if suffix in unpack:
        return unpack[suffix]
    if suffix == ".xlsx":
        return f'python3 -c "{ROWS_OF_SHEET}" {source} > {shlex.quote(str(Path(path).with_suffix(".jsonl")))}'
    return readable(path)


def _not_found(path: str) -> Problem:
    """The problem of a path that does not exist, with the nearest that does."""
    place = Path(path)
    parent = place.parent
    if glob.has_magic(path):
        return Problem(
            code="data.not-found", message="no file matches this pattern", where=path, hint=_neighbours(Path(_before_magic(path)), "")
        )
    while not parent.is_dir():
        parent, place = parent.parent, parent
    missing = "there is no such file or folder" if place == Path(path) else f"there is no folder {place}"
    return Problem(code="data.not-found", message=missing, where=path, hint=_neighbours(parent, place.name))


def _before_magic(path: str) -> str:
    place = Path(path)
    while glob.has_magic(str(place)) or not place.is_dir():
        if place == place.parent:
            break
        place = place.parent
    return str(place)


def _neighbours(folder: Path, name: str) -> str:
    try:
        entries = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir() if not p.name.startswith("."))
    except OSError:
        entries = []
    near = difflib.get_close_matches(name, entries, n=1, cutoff=0.6) if name else []
    if near:
        return f"the nearest name there is {folder / near[0]}"
    data = [entry for entry in entries if _looks_like_data(entry)]
    if data:
        return f"{folder} holds {', '.join(data[:5])}"
    return _sample()


def _sample() -> str:
    """How to come by rows: the sample, which is written once."""
    rows = RAW_DATA / FILE_NAME
    return f"{rows} is there" if rows.is_file() else f"llamahome data sample   writes rows to begin with into {rows}"
