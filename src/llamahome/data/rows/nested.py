"""Recognises rows that lie within objects, as APIs and labelling tools export them, and suggests what takes them out."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llamahome.data.files.commands import list_within, run_python, sibling
from llamahome.data.files.kinds import ending
from llamahome.data.records import Row
from llamahome.data.rows.column_roles import PROMPT, plain_name
from llamahome.data.rows.columns import text_paths

_IN_LIST = "import json,sys; json.dump([r[sys.argv[3]] for r in json.load(open(sys.argv[1],encoding='utf-8-sig'))[sys.argv[2]]],sys.stdout)"
_IN_ARRAY = "import json,sys; json.dump([r[sys.argv[2]] for r in json.load(open(sys.argv[1],encoding='utf-8-sig'))],sys.stdout)"

FormatOf = Callable[[Mapping[str, Any]], str | None]


def nested_rows(rows: Sequence[Row], format_of: FormatOf) -> str | None:
    """What makes rows of objects within the rows: `{"row": {...}}` in each, or `{"rows": [{"row": {...}}, ...]}`; None for other rows."""
    value, path = rows[0].value, rows[0].source
    packed = path.lower().endswith((".gz", ".zst"))
    if (key := _inside(value, format_of)) is not None:
        advice = f'the rows are objects under "{key}": write each of them as a row of its own'
        if packed or not key.isidentifier():
            return advice
        if ending(path) in (".jsonl", ".ndjson"):
            return f"jq -c .{key} {shlex.quote(path)} > {shlex.quote(str(sibling(path, '-rows.jsonl')))}"
        is_array = ending(path) == ".json" and _begins_with(path, "[")
        return run_python(_IN_ARRAY, path, key, output=sibling(path, "-rows.json")) if is_array else advice
    within = list_within(value)
    if within is None or len(rows) > 1 or ending(path) != ".json":
        return None
    first = value[within][0]
    if (key := _inside(first, format_of)) is not None and not packed:
        return run_python(_IN_LIST, path, within, key, output=sibling(path, "-rows.json"))
    deeper = list_within(first)
    if deeper is not None and format_of(first) is None:
        return (
            f"the rows are in lists within lists ({within}[].{deeper}[]): write one object for each, with what it needs of those around it"
        )
    return None


def _inside(value: Mapping[str, Any], format_of: FormatOf) -> str | None:
    """The only key under which an object without a question of its own has the keys of a row, or all that it has: some texts.

    None if others hold texts too, such as annotations beside the text that they are about.
    """
    if any(isinstance(cell, str) and plain_name(key) in PROMPT for key, cell in value.items()):
        return None
    others = [key for key in value if plain_name(key).strip("_") not in ("id", "idx", "index", "row_idx")]
    keys = [key for key, part in value.items() if isinstance(part, dict) and (format_of(part) is not None or len(others) == 1)]
    texts = keys and any(isinstance(cell, str | list) for cell in value[keys[0]].values())
    beside = texts and text_paths({key: cell for key, cell in value.items() if key != keys[0]})
    return keys[0] if len(keys) == 1 and texts and not beside else None


def _begins_with(path: str, mark: str) -> bool:
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            return file.read(1024).lstrip().startswith(mark)
    except (OSError, ValueError):
        return False
