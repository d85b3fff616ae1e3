"""What a file really is when it is not what its name says: archives, tables, documents, Git LFS pointers, told by their first bytes.

Each help line makes a file that is read. Cost: the first bytes, which are read anyhow; of a zip or SQLite file also its list
of contents.
"""

import contextlib
import shlex
import sqlite3
import zipfile
from pathlib import Path

from llamahome.data.files.watch import WatchedFile
from llamahome.errors import DataError, Problem
from llamahome.lfs import is_pointer_text, lfs_problem

_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"PK\x03\x04", "zip"),
    (b"PAR1", "Parquet"),
    (b"ARROW1", "Arrow"),
    (b"\xff\xff\xff\xff", "Arrow"),
    (b"FEA1", "Feather of version 1"),
    (b"SQLite format 3\0", "SQLite"),
    (b"ORC", "ORC"),
    (b"Obj\x01", "Avro"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"\x93NUMPY", "an array of NumPy"),
    (b"%PDF-", "PDF"),
    (b"{\\rtf", "RTF"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office file (.xls or .doc)"),
    (b"GGUF", "a GGUF model"),
    (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
)
_ENDING = {"gzip": ".gz", "zstd": ".zst"}
_TEXT_MARKS = ("Parquet", "Arrow", "ORC", "bzip2", "a GGUF model")
"""Their first bytes are letters, so a text may begin with them: it counts only with bytes that no text has."""
_ROWS_OF_TABLE = (
    "import json,sqlite3,sys; c=sqlite3.connect(sys.argv[1]); c.row_factory=sqlite3.Row; "
    "[print(json.dumps(dict(r),default=str)) for r in c.execute('select * from '+sys.argv[2])]"
)
_LOOK = 1 << 16
_MARKUP = (".xml", ".html", ".htm", ".yaml", ".yml", ".toml", ".ini", ".rtf", ".svg", ".xls")
"""Text, but not to be learned with its signs."""
_TABLES = (".psv", ".tab", ".ssv", ".dsv")
ROWS_OF_SHEET = "import pandas,sys; print(pandas.read_excel(sys.argv[1]).to_json(orient='records', lines=True), end='')"


def real_kind(head: bytes) -> str | None:
    """What the first bytes of a file say that it is; None when they are text or nothing known."""
    for mark, name in _MAGIC:
        if head.startswith(mark) and (name not in _TEXT_MARKS or not _is_text(head)):
            return name
    if head[257:262] == b"ustar":
        return "tar"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "a pickle of Python"
    return None


def _is_text(head: bytes) -> bool:
    return not any(byte < 9 or 13 < byte < 32 for byte in head[:4096])


def refuse_disguised(file: WatchedFile, head: bytes, named: str | None) -> None:
    """DataError when the file is something else than `named`, the kind that its name says (None: text whose first bytes decide)."""
    if is_pointer_text(head):
        raise DataError(lfs_problem(file.path))
    found = real_kind(head)
    if found is None or found.lower() == named:
        return
    if found == "zip":
        found, hint = _zip(file)
    else:
        hint = _mend(file, found)
    suffix = Path(file.path).suffix
    if file.place != file.path:
        what = f"what is packed in the file is {found}"
    elif suffix:
        what = f"the file is {found}, not {suffix.lower()} as its name says"
    else:
        what = f"the file is {found}, which is not read under a name without an ending"
    raise DataError(Problem(code="data.other-kind", message=what, where=file.path, hint=hint))


def _mend(file: WatchedFile, found: str) -> str | None:
    """A command that makes of the file one that is read."""
    path = Path(file.path)
    source = shlex.quote(file.path)
    folder = shlex.quote(str(path.with_name(f"{path.stem}-unpacked")))
    if found == "tar":
        return f"mkdir {folder} && tar -xf {source} -C {folder}"
    if file.place != file.path:
        return None
    plain = shlex.quote(str(path.with_name(f"{path.stem}-unpacked{path.suffix}")))
    if found in _ENDING:
        inner = path.with_suffix("") if path.suffix.lower() in _ENDING.values() else path
        return f"mv {source} {shlex.quote(str(inner) + _ENDING[found])}"
    if found in ("bzip2", "xz"):
        return f"{found} -dc < {source} > {plain}"
    if found in ("Parquet", "Arrow"):
        return f"mv {source} {shlex.quote(str(path.with_suffix('.' + found.lower())))}"
    if found == "SQLite" and (table := _only_table(file.place)) is not None:
        rows = shlex.quote(str(path.with_name(path.stem + "-rows.jsonl")))
        return f'python3 -c "{_ROWS_OF_TABLE}" {source} {shlex.quote(table)} > {rows}'
    if found == "PDF":
        return f"pdftotext {source} {shlex.quote(str(path.with_name(path.stem + '-text.txt')))}"
    return None


def _zip(file: WatchedFile) -> tuple[str, str | None]:
    """What kind of zip file it is, and what makes rows of it."""
    try:
        with zipfile.ZipFile(file.place) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError):
        return "a zip archive that is cut short or damaged", None
    path = Path(file.path)
    if "xl/workbook.xml" in names:
        if file.place != file.path:
            return "an Excel file (.xlsx)", None
        rows = shlex.quote(str(path.with_name(path.stem + "-rows.jsonl")))
        return "an Excel file (.xlsx)", f'python3 -c "{ROWS_OF_SHEET}" {shlex.quote(file.path)} > {rows}'
    if "word/document.xml" in names:
        return "a Word file (.docx)", None
    if any(name.endswith(".pkl") for name in names):
        return "a file of torch.save", None
    if names and all(name.endswith(".npy") for name in names):
        return "arrays of NumPy (.npz)", None
    folder = shlex.quote(str(path.with_name(f"{path.stem}-unpacked")))
    return "a zip archive", f"python3 -m zipfile -e {shlex.quote(file.path)} {folder}" if file.place == file.path else None


def _only_table(place: str) -> str | None:
    """The quoted name of the one table of a SQLite file; None when there are several, for nobody knows which holds the rows."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(f"file:{place}?mode=ro&immutable=1", uri=True)) as found:
        names = [str(name) for (name,) in found.execute("select name from sqlite_master where type = 'table' and name not like 'sqlite_%'")]
        if len(names) == 1:
            return '"' + names[0].replace('"', '""') + '"'
    return None


def text_under(path: str, head: bytes) -> tuple[str, str | None] | None:
    """What stands under the name of an archive or a table that is text or another kind: its name and the command that mends it."""
    suffix = Path(path).suffix.lower()
    source, place = shlex.quote(path), Path(path)
    found = real_kind(head)
    if found is not None:
        if found in _ENDING and _ENDING[found] != suffix:
            return f"it is {found}", f"mv {source} {shlex.quote(str(place.with_suffix(_ENDING[found])))}"
        if found in ("Parquet", "Arrow"):
            inner = place.with_suffix("") if suffix in _ENDING.values() else place
            return f"it is {found}", f"mv {source} {shlex.quote(str(inner.with_suffix('.' + found.lower())))}"
        return f"it is {found}", None
    try:
        text = head[: head.rfind(b"\n") + 1 or len(head)].decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if not text.strip() or not _is_text(head):
        return None
    if suffix in _ENDING.values():
        return "it is text that is not packed", f"mv {source} {shlex.quote(str(place.with_suffix('')))}"
    begin = text.lstrip()[:1]
    better = {"{": ".jsonl", "[": ".json"}.get(begin)
    return "it is text", f"mv {source} {shlex.quote(str(place.with_suffix(better)))}" if better else None


def readable(path: str) -> str | None:
    """A command that makes of a file whose name is not read one that is, told by its content; None where nothing does."""
    try:
        file = WatchedFile(path)
        head = file.read(0, min(_LOOK, file.size))
        file.close()
    except DataError:  # what cannot be read is told where it is named
        return None
    found = real_kind(head)
    bare = Path(path).with_suffix("").with_suffix("")  # a name without an ending is told by its content
    if found in _ENDING:
        return f"mv {shlex.quote(path)} {shlex.quote(str(bare) + _ENDING[found])}"
    if found in ("bzip2", "xz"):
        return f"{found} -dc < {shlex.quote(path)} > {shlex.quote(str(bare) + '-unpacked')}"
    if found is not None:
        return _zip(file)[1] if found == "zip" else _mend(file, found)
    source, place = shlex.quote(path), Path(path)
    try:
        text = head[: head.rfind(b"\n") + 1 or len(head)].decode("utf-8-sig").lstrip()
    except UnicodeDecodeError:
        return None
    if not text or not _is_text(head) or place.suffix.lower() in _MARKUP:
        return None
    better = {"{": ".jsonl", "[": ".json"}.get(text[0]) or (".csv" if place.suffix.lower() in _TABLES else None)
    if better is not None:
        return f"cp {source} {shlex.quote(str(_free(place, better)))}"
    return f"cp {source} {shlex.quote(path + '.txt')}   if it is text to learn whole; rows are best written as one JSON object a line"


def _free(place: Path, suffix: str) -> Path:
    """The name with another ending, or one like it that no file has."""
    there = place.with_suffix(suffix)
    return place.with_name(f"{place.stem}-{place.suffix[1:]}{suffix}") if there.exists() else there
