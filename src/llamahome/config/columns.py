"""The setting data.columns: names of columns, and templates over them, checked before any row is read."""

import re
from difflib import get_close_matches


def template_pieces(written: str) -> tuple[tuple[str, str | None], ...]:
    """A value of data.columns in pieces: (text, None), and ("", column) for each `{column}`; `{{` and `}}` are braces. ValueError."""
    pieces: list[tuple[str, str | None]] = []
    for found in re.finditer(r"(\{\{|\}\})|\{([^{}]+)\}|([^{}]+)|([{}])", written):
        escaped, column, text, stray = found.groups()
        if stray:
            at = found.start() + 1
            raise ValueError(f"{written!r} has a lone {stray!r} at character {at}; {{column}} is a column, {stray * 2} a brace")
        pieces.append(("", column) if column else ((escaped or text)[: 1 if escaped else None], None))
    return tuple(pieces)


def check_columns(names: dict[str, str]) -> dict[str, str]:
    """The mapping itself when every key is one that a format reads and every template is whole; raises ValueError."""
    known = ["messages", "conversations", "system", "tools", "instruction", "input", "output", "history", "prompt", "completion", "text"]
    texts = ("system", "instruction", "input", "output", "prompt", "completion", "text")
    for ours, theirs in names.items():
        if ours not in known:
            near = get_close_matches(ours, known, n=1)
            guess = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{ours!r} is not a key that a format reads{guess}; those are {', '.join(known)}")
        if not theirs:
            raise ValueError(f"{ours} has no name")
        pieces = template_pieces(theirs)
        if ours not in texts and any(column for _, column in pieces):
            raise ValueError(f"{ours} is a list and takes the name of a column; templates make {', '.join(texts)}")
    return names
