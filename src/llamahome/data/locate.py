"""A path that people typed to the files it means: a JSONL file, all of a folder, or a glob.

A path that means nothing is answered with the nearest name that exists; a kind of file that is not read with what turns it into JSONL.
"""

import difflib
import glob
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from llamahome.errors import DataError, Problem

_READ = (".jsonl", ".ndjson")
_DATA = (".json", ".parquet", ".csv", ".tsv", ".txt", ".md", ".arrow", ".gz", ".zst", ".xlsx")
"""Kinds of files that hold data but are not read; told by name when they lie in a folder."""


@dataclass(frozen=True)
class Located:
    """What a path means."""

    files: tuple[str, ...]
    ignored: tuple[str, ...] = ()


def locate(path: str) -> Located:
    """The files that `path` means, sorted; raises DataError when there are none."""
    place = Path(path)
    if place.is_dir():
        return _folder(path)
    if place.exists() or place.is_symlink():
        _refuse_unsupported(path)
        return Located((path,))
    if glob.has_magic(path):
        found = sorted(str(p) for p in Path(place.anchor).glob(str(place.relative_to(place.anchor))) if not p.is_dir())
        if found:
            for name in found:
                _refuse_unsupported(name)
            return Located(tuple(found))
    raise DataError(_not_found(path))


def _folder(path: str) -> Located:
    root = Path(path)
    try:
        below = sorted(p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts))
        files = [p for p in below if not p.is_dir()]
        next(root.iterdir(), None)
    except OSError as error:
        raise DataError(
            Problem(
                code="data.unreadable",
                message=f"cannot read the folder: {error.strerror}",
                where=path,
                hint=f"chmod u+rx {shlex.quote(path)}",
            )
        ) from error
    read = tuple(str(p) for p in files if p.suffix.lower() in _READ)
    if read:
        return Located(read, tuple(str(p) for p in files if p.suffix.lower() in _DATA))
    if not files:
        message, hint = "the folder is empty", f"llamahome data sample {shlex.quote(path)}"
    else:
        names = ", ".join(str(p.relative_to(root)) for p in files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
        message, hint = f"the folder holds no .jsonl file; it holds {names}", _how_to_convert(str(files[0]))
    raise DataError(Problem(code="data.empty-folder", message=message, where=path, hint=hint))


def _refuse_unsupported(path: str) -> None:
    """DataError unless the file is JSONL by its name, has no suffix, or is a .json file of one object a line."""
    place = Path(path)
    suffix = place.suffix.lower()
    if place.exists() and not place.is_file():
        raise DataError(
            Problem(code="data.unsupported-file", message="this is not a regular file", where=path, hint="save it as a .jsonl file")
        )
    if suffix in _READ or not suffix or (suffix == ".json" and _first_line_is_object(place)):
        return
    raise DataError(
        Problem(
            code="data.unsupported-file",
            message=f"{suffix} files are not read; JSONL (one JSON object a line) is what this version reads",
            where=path,
            hint=_how_to_convert(path),
        )
    )


def _first_line_is_object(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return isinstance(json.loads(file.readline(1 << 24).decode("utf-8-sig")), dict)
    except (OSError, ValueError, RecursionError):
        return False


def _how_to_convert(path: str) -> str:
    """A command that writes the file as JSONL."""
    suffix = Path(path).suffix.lower()
    source = shlex.quote(path)
    if suffix == ".gz":
        return f"gunzip --keep {source}"
    if suffix == ".zst":
        return f"zstd -d {source}"
    target = shlex.quote(str(Path(path).with_suffix(".jsonl")))
    readers = {
        ".json": "import json,sys; [print(json.dumps(r)) for r in json.load(open(sys.argv[1]))]",
        ".csv": "import csv,json,sys; [print(json.dumps(r)) for r in csv.DictReader(open(sys.argv[1], newline=''))]",
        ".tsv": "import csv,json,sys; [print(json.dumps(r)) for r in csv.DictReader(open(sys.argv[1], newline=''), delimiter='\\t')]",
        ".parquet": "import pandas,sys; print(pandas.read_parquet(sys.argv[1]).to_json(orient='records', lines=True), end='')",
        ".arrow": "import pandas,sys; print(pandas.read_feather(sys.argv[1]).to_json(orient='records', lines=True), end='')",
        ".xlsx": "import pandas,sys; print(pandas.read_excel(sys.argv[1]).to_json(orient='records', lines=True), end='')",
    }
    as_text = "import json,sys; [print(json.dumps({'text': t})) for t in open(sys.argv[1]).read().split('\\n\\n') if t.strip()]"
    return f'python3 -c "{readers.get(suffix, as_text)}" {source} > {target}'


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
    data = [entry for entry in entries if Path(entry).suffix in _READ]
    if data:
        return f"{folder} holds {', '.join(data[:5])}"
    return "llamahome data sample writes rows to begin with into data/training/raw/docstrings.jsonl"
