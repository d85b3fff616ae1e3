"""What a file really is if it is not what its name says: archives, tables, documents, Git LFS pointers, recognised by their first bytes.

Each hint is a command that makes a readable file of it. Cost: the first bytes, which are read anyway; of a zip or SQLite file also the
list of its contents.
"""

import contextlib
import shlex
import sqlite3
import zipfile
from pathlib import Path

from llamahome.data.files.commands import ROWS_OF_SHEET, move, run_python, sibling
from llamahome.data.files.guarded_file import GuardedFile
from llamahome.data.files.served import served_instead
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
    (b"PARE", "encrypted Parquet"),
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
_PACKED = {"gzip": ".gz", "zstd": ".zst"}
_COLUMNAR = {"Parquet": ".parquet", "Arrow": ".arrow"}
_TEXT_MARKS = ("Parquet", "encrypted Parquet", "Arrow", "ORC", "bzip2", "a GGUF model")
"""Their first bytes are letters, and a text may begin with them, so they count only beside bytes that no text has."""
_ROWS_OF_TABLE = (
    "import json,sqlite3,sys; c=sqlite3.connect(sys.argv[1]); c.row_factory=sqlite3.Row; "
    "[print(json.dumps(dict(r),default=str)) for r in c.execute('select * from '+sys.argv[2])]"
)
_ARCHIVES = {".tar": ("tar", "gzip", "zstd"), ".tgz": ("gzip",), ".zip": ("zip",), ".bz2": ("bzip2",), ".xz": ("xz",)}
"""What a file of each ending is; a .tar may be packed, as .tar.gz."""
_DAMAGED = "a {} archive that is cut short or damaged"
_MARKUP = (".xml", ".html", ".htm", ".yaml", ".yml", ".toml", ".ini", ".rtf", ".svg", ".xls")
"""Text whose markup should not be learned."""
_TABLES = (".psv", ".tab", ".ssv", ".dsv")
_JSON = {"{": ".jsonl", "[": ".json"}
"""The ending of a text that begins with the character."""


def real_kind(head: bytes) -> str | None:
    """What the first bytes of a file say that it is; None if they are text or unknown."""
    for mark, name in _MAGIC:
        if head.startswith(mark) and (name not in _TEXT_MARKS or not _is_text(head)):
            return name
    if head[257:262] == b"ustar":
        return "tar"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "a pickle of Python"
    return None


def refuse_disguised(file: GuardedFile, head: bytes, named: str | None) -> None:
    """DataError if the file is not of the kind `named` that its name says (None: text, told apart by its first bytes)."""
    if is_pointer_text(head):
        raise DataError(lfs_problem(file.path))
    found = _found_instead(file, head, named)
    if found is None:
        return
    real, hint = found
    suffix = Path(file.path).suffix
    if file.is_copy:
        message = f"what is packed in the file is {real}"
    elif suffix:
        message = f"the file is {real}, not {suffix.lower()} as its name says"
    else:
        message = f"the file is {real}, which is not read under a name without an ending"
    raise DataError(Problem(code="data.other-kind", message=message, where=file.path, hint=hint))


def _found_instead(file: GuardedFile, head: bytes, named: str | None) -> tuple[str, str | None] | None:
    """What the file is, and the command or advice that mends it; None if it may be of the kind `named`."""
    real = real_kind(head)
    if real is None:
        return served_instead(head, file.size, named) if named not in ("text", "parquet", "arrow") else None
    if real.lower() == named:
        return None
    return _zip(file) if real == "zip" else (real, _conversion(file, real))


def real_content(path: str, head: bytes) -> tuple[str, str | None] | None:
    """What a file that should be an archive or a columnar table is instead, with the command that renames it; None if unknown."""
    suffix, place, real = Path(path).suffix.lower(), Path(path), real_kind(head)
    if real in _PACKED and _PACKED[real] != suffix:
        return f"it is {real}", move(path, place.with_suffix(_PACKED[real]))
    if real in _COLUMNAR:
        inner = place.with_suffix("") if suffix in _PACKED.values() else place
        return f"it is {real}", move(path, inner.with_suffix(_COLUMNAR[real]))
    if real is not None:
        return f"it is {real}", None
    served = served_instead(head, len(head), None)
    if served is not None:
        return f"it is {served[0]}", served[1]
    text = _text(head)
    if not text or (suffix in _COLUMNAR.values() and text.startswith(("PAR1", "ARROW1"))):
        return None
    if suffix in _PACKED.values():
        return "it is text that is not packed", move(path, place.with_suffix(""))
    return "it is text", move(path, place.with_suffix(_JSON[text[0]])) if text[0] in _JSON else None


def conversion_by_content(path: str) -> str | None:
    """A command that makes a readable file of one whose ending is not read, chosen by its content; None if there is none."""
    try:
        file = GuardedFile(path)
        head = file.head()
        file.close()
    except DataError:  # reported where the file is named
        return None
    real = real_kind(head)
    bare = str(Path(path).with_suffix("").with_suffix(""))  # without an ending the content decides
    if real in _PACKED:
        return move(path, bare + _PACKED[real])
    if real in ("bzip2", "xz"):
        return f"{real} -dc < {shlex.quote(path)} > {shlex.quote(bare + '-unpacked')}"
    if real is not None:
        return _zip(file)[1] if real == "zip" else _conversion(file, real)
    text, suffix = _text(head), Path(path).suffix.lower()
    if not text or suffix in _MARKUP:
        return None
    ending = _JSON.get(text[0]) or (".csv" if suffix in _TABLES else None)
    if ending is None:
        target = shlex.quote(path + ".txt")
        return f"cp {shlex.quote(path)} {target}   if it is text to learn whole; rows are best written as one JSON object a line"
    renamed = Path(path).with_suffix(ending)
    return f"cp {shlex.quote(path)} {shlex.quote(str(sibling(path, f'-{suffix[1:]}{ending}') if renamed.exists() else renamed))}"


def wrong_archive(path: str, suffix: str) -> tuple[str, str | None] | None:
    """What is wrong with a file that is named as an archive, and what mends it; None if its first bytes are those of one."""
    if suffix not in _ARCHIVES:
        return None
    file = GuardedFile(path)
    head, what = file.head(), None
    file.close()
    if real_kind(head) not in _ARCHIVES[suffix]:
        instead = real_content(path, head) if head else ("it is empty", "copy or download it again")
        return None if instead is None else (f"this is no {suffix} file: {instead[0]}", instead[1] or conversion_by_content(path))
    if suffix == ".zip":
        what = _zip(file)[0]
    elif suffix == ".tar" and head[257:262] == b"ustar" and file.size % 512:
        what = _DAMAGED.format("tar")
    return (f"this is {what}", "copy or download it again") if what is not None and "damaged" in what else None


def _conversion(file: GuardedFile, real: str) -> str | None:
    """A command that makes a readable file of one that is of the kind `real`."""
    path, source = Path(file.path), shlex.quote(file.path)
    if real == "tar":
        folder = shlex.quote(str(sibling(file.path, "-unpacked")))
        return f"mkdir {folder} && tar -xf {source} -C {folder}"
    if file.is_copy:
        return None
    if real in _PACKED:
        inner = path.with_suffix("") if path.suffix.lower() in _PACKED.values() else path
        return move(file.path, str(inner) + _PACKED[real])
    if real in ("bzip2", "xz"):
        return f"{real} -dc < {source} > {shlex.quote(str(sibling(file.path, f'-unpacked{path.suffix}')))}"
    if real in _COLUMNAR:
        return move(file.path, path.with_suffix(_COLUMNAR[real]))
    if real == "SQLite" and (table := _only_table(file.place)) is not None:
        return run_python(_ROWS_OF_TABLE, file.path, table, output=sibling(file.path, "-rows.jsonl"))
    if real == "PDF":
        return f"pdftotext {source} {shlex.quote(str(sibling(file.path, '-text.txt')))}"
    return None


def _zip(file: GuardedFile) -> tuple[str, str | None]:
    """What kind of zip file it is, and the command that makes rows of it."""
    try:
        with zipfile.ZipFile(file.place) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError):
        return _DAMAGED.format("zip"), None
    if "xl/workbook.xml" in names:
        rows = run_python(ROWS_OF_SHEET, file.path, output=sibling(file.path, "-rows.jsonl"))
        return "an Excel file (.xlsx)", None if file.is_copy else rows
    if "word/document.xml" in names:
        return "a Word file (.docx)", None
    if any(name.endswith(".pkl") for name in names):
        return "a file of torch.save", None
    if names and all(name.endswith(".npy") for name in names):
        return "arrays of NumPy (.npz)", None
    folder = shlex.quote(str(sibling(file.path, "-unpacked")))
    return "a zip archive", None if file.is_copy else f"python3 -m zipfile -e {shlex.quote(file.path)} {folder}"


def _only_table(place: str) -> str | None:
    """The quoted name of the only table of a SQLite file; None if there are several, because any of them may hold the rows."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(f"file:{place}?mode=ro&immutable=1", uri=True)) as file:
        names = [str(name) for (name,) in file.execute("select name from sqlite_master where type = 'table' and name not like 'sqlite_%'")]
        if len(names) == 1:
            return '"' + names[0].replace('"', '""') + '"'
    return None


def _is_text(head: bytes) -> bool:
    return not any(byte < 9 or 13 < byte < 32 for byte in head[:4096])


def _text(head: bytes) -> str:
    """The whole lines of the head without white space before them; "" if they are not UTF-8 text."""
    try:
        text = head[: head.rfind(b"\n") + 1 or len(head)].decode("utf-8-sig").lstrip()
    except UnicodeDecodeError:
        return ""
    return text if _is_text(head) else ""
