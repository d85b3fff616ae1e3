"""Recognises a table that is not written as RFC 4180 says, and suggests the command that writes it so.

Quotes within a field may follow a backslash (MySQL) or be part of the text, single quotes may enclose fields, a space may follow each
delimiter, a delimiter may end each row, and lines may come before the names of the columns. Such a form is reported only if it gives each
of the first records as many fields as there are names, and the standard does not. A table that is drawn with lines of - and | is known by
the line below the names. Cost: a few parses of the first records of such a file.
"""

import csv
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llamahome.data.files.commands import run_python, sibling

_REWRITE = (
    r"import csv,sys; csv.writer(sys.stdout,delimiter=sys.argv[2],lineterminator='\n').writerows(r{fields} for r in "
    r"csv.reader(open(sys.argv[1],encoding='utf-8-sig',newline=''),delimiter=sys.argv[2]{options}) if r)"
)
_UNDRAW = (
    r"import csv,re,sys; csv.writer(sys.stdout,lineterminator='\n').writerows([c.strip() for c in "
    r"re.sub('^[|]|[|]$','',l.strip()).split('|')] for l in open(sys.argv[1],encoding='utf-8-sig') "
    r"if '|' in l and not re.fullmatch('[-+|:= ]+',l.strip()))"
)
_LINE = r"(?::?[-=]{2,}:?|:-:?|-:)"
_RULE = re.compile(rf"[|+ ]*{_LINE}(?: *[|+] *{_LINE})+[|+ ]*")
"""Matches a line between the names and the rows of a table that is drawn."""
_TESTED = 50
"""Records."""
_LINES_BEFORE = 20
_NAME = re.compile(r"\"?[^\W\d]\w*\"?")
"""Matches the name of a column in a table with other lines before it."""


@dataclass(frozen=True)
class _Dialect:
    """A way to write a table."""

    what: str
    mark: str
    """A pattern that such a table contains; D stands for the delimiter."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Of csv.reader."""
    written: str = ""
    """The same in Python, without characters that a shell changes within double quotes."""
    ends: bool = False
    """Whether a delimiter ends each row after the first."""


_PLAIN_QUOTES = ",quoting=3"
_QUOTED = re.compile(r'\s*".*"\s*', re.DOTALL)
"""Matches a field in quotes: then quotes are no part of the texts."""
_DIALECTS = (
    _Dialect("quotes within a field follow a backslash", r'\\"', {"escapechar": "\\"}, ",escapechar=chr(92)"),
    _Dialect("fields are in single quotes", "(?m)(?:^|D)'", {"quotechar": "'"}, ",quotechar=chr(39)"),
    _Dialect("a space is before the quotes of a field", 'D "', {"skipinitialspace": True}, ",skipinitialspace=True"),
    _Dialect("each row ends with one delimiter more than the names", r"(?m)D\r?$", ends=True),
    _Dialect("quotes are part of the texts", '"', {"quoting": csv.QUOTE_NONE}, _PLAIN_QUOTES),
)


def other_dialect(path: str, text: str, delimiter: str, *, whole: bool) -> tuple[str, str] | None:
    """What is unusual in the table that begins with `text`, and the command that rewrites it; None if it fits the standard or nothing.

    Unless `text` is the `whole` file its last record is not tested.
    """
    lines = [line.strip() for line in text.split("\n", 4)[:4]]
    if any(map(_RULE.fullmatch, lines)) and any("|" in line and not _RULE.fullmatch(line) for line in lines):
        undrawn = run_python(_UNDRAW, path, output=sibling(path, "-rewritten.csv"))
        return "it is drawn with lines of - and |, as Markdown, psql and mysql show tables", undrawn
    if _fit(_parsed(text, delimiter, whole=whole)):
        return None
    for dialect in _DIALECTS:
        if not re.search(dialect.mark.replace("D", re.escape(delimiter)), text):
            continue
        records = _parsed(text, delimiter, whole=whole, options=dialect.options)
        if dialect.ends and not any(record[-1] for record in records[1:]):
            records = [*records[:1], *(record[:-1] for record in records[1:])]
        if dialect.written == _PLAIN_QUOTES and (
            delimiter != "\t" or any(_QUOTED.fullmatch(cell) for record in records for cell in record)
        ):
            continue  # commas are rarely without quotes, so there an open quote is a mistake
        if _fit(records):
            code = _REWRITE.format(fields=f"[:{len(records[0])}]" if dialect.ends else "", options=dialect.written)
            return dialect.what, run_python(code, path, delimiter, output=sibling(path, f"-rewritten{Path(path).suffix}"))
    return _lines_before(path, text, whole=whole)


def _lines_before(path: str, text: str, *, whole: bool) -> tuple[str, str] | None:
    """The same for a table whose names are not in the first line."""
    lines = text.split("\n")
    for before in range(1, min(_LINES_BEFORE, len(lines) - 2) + 1):
        for delimiter in ",;\t|":
            names = lines[before].rstrip("\r").split(delimiter)
            if len(names) < 2 or not all(map(_NAME.fullmatch, names)):
                continue
            alone = all(delimiter not in line and not _NAME.fullmatch(line.strip()) for line in lines[:before])
            if alone and _fit(_parsed("\n".join(lines[before:]), delimiter, whole=whole)):
                what = f"the names of the columns are in line {before + 1}, after other lines"
                target = sibling(path, f"-table{Path(path).suffix}")
                return what, f"tail -n +{before + 1} {shlex.quote(path)} > {shlex.quote(str(target))}"
    return None


def _fit(records: Sequence[Sequence[str]]) -> bool:
    """Whether there are rows, and all have as many fields as there are names, at least two."""
    return len(records) > 1 and len(records[0]) > 1 and len({len(record) for record in records}) == 1


def _parsed(text: str, delimiter: str, *, whole: bool, options: Mapping[str, object] | None = None) -> list[list[str]]:
    """The first complete records; none if one is broken."""
    records: list[list[str]] = []
    before = csv.field_size_limit(1 << 26)
    try:
        reader = csv.reader((line + "\n" for line in text.split("\n")), delimiter=delimiter, strict=True, **(options or {}))  # type: ignore[arg-type]
        for record in reader:
            if record:
                records.append(record)
            if len(records) > _TESTED:
                return records[:-1]
    except csv.Error as error:
        return [] if whole or "unexpected end" not in str(error) else records  # the beginning of a file may end within quotes
    finally:
        csv.field_size_limit(before)
    return records if whole else records[:-1]
