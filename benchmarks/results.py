"""The results file: one JSON per day and number of cores. A part that is measured again replaces itself, the others stay."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PARTS = ("data", "forward", "backward", "exchange", "update")
"""Of every step; saving and evaluating come now and then."""
_NAME = re.compile(r"\d{4}-\d\d-\d\d-\d+cores(?:-(avx2|avx512))?\.json")


def load(path: Path) -> dict[str, Any]:
    """What stands in the file; empty without one."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`new` over `old`: parts hold scenarios, which replace those of the same name; commands are all kept."""
    told = {**old, **new}
    for part in ("speed", "length", "quality", "raw"):
        told[part] = {**old.get(part, {}), **new.get(part, {})}
    told["commands"] = [*old.get("commands", []), *(one for one in new.get("commands", []) if one not in old.get("commands", []))]
    return told


def store(path: Path, new: Mapping[str, Any]) -> dict[str, Any]:
    """Write `new` into the file, whole or not at all, and return everything that stands there now."""
    told = merged(load(path), new)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return told


def newest(folder: Path, level: str = "native") -> Path | None:
    """The last whole results file of a level by its date; smoke runs do not count."""
    names = ((path, _NAME.fullmatch(path.name)) for path in folder.glob("*.json"))
    return max((path for path, found in names if found and (found[1] or "native") == level), default=None)
