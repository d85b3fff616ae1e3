"""Checks the setting data.columns, column names and templates over columns, before any row is read."""

import re
from difflib import get_close_matches


def template_pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    """The pieces of a template: (text, None), and ("", column) for each `{column}`. `{{` and `}}` are braces; ValueError for a lone one."""
    pieces: list[tuple[str, str | None]] = []
    for match in re.finditer(r"(\{\{|\}\})|\{([^{}]+)\}|([^{}]+)|([{}])", template):
        escaped, column, text, stray = match.groups()
        if stray:
            at = match.start() + 1
            raise ValueError(f"{template!r} has a lone {stray!r} at character {at}; {{column}} is a column, {stray * 2} a brace")
        pieces.append(("", column) if column else ((escaped or text)[: 1 if escaped else None], None))
    return tuple(pieces)


def check_columns(columns: dict[str, str]) -> dict[str, str]:
    """The mapping itself; raises ValueError for a key that no format reads, and for a broken template."""
    known = ["messages", "conversations", "system", "tools", "instruction", "input", "output", "history", "prompt", "completion", "text"]
    known += ["chosen", "rejected", "label"]
    texts = ("system", "instruction", "input", "output", "prompt", "completion", "text")
    for key, template in columns.items():
        if key not in known:
            near = get_close_matches(key, known, n=1)
            guess = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{key!r} is not a key that a format reads{guess}; those are {', '.join(known)}")
        if not template:
            raise ValueError(f"{key} has no name")
        pieces = template_pieces(template)
        if key not in texts and any(column for _, column in pieces):
            raise ValueError(f"{key} is a list and takes the name of a column; templates make {', '.join(texts)}")
    return columns
