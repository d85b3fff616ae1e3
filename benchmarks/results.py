"""Reads and writes the results file: one JSON per day and number of cores. A repeated part replaces its earlier result."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PARTS = ("data", "forward", "backward", "exchange", "update")
"""The parts of every step, without saving and evaluation."""
_NAME = re.compile(r"\d{4}-\d\d-\d\d-\d+cores(?:-(avx2|avx512))?\.json")


def load(path: Path) -> dict[str, Any]:
    """Read the file; empty if it is missing."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return results


def merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `new` into `old`: scenarios replace those of the same name, commands are all kept."""
    results = {**old, **new}
    for part in ("speed", "length", "quality", "raw"):
        results[part] = {**old.get(part, {}), **new.get(part, {})}
    results["commands"] = [*old.get("commands", []), *(one for one in new.get("commands", []) if one not in old.get("commands", []))]
    return results


def store(path: Path, new: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `new` into the file atomically and return its new content."""
    results = merge(load(path), new)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return results


def files(folder: Path, level: str = "native") -> list[Path]:
    """Return the results files of a level, the oldest first, without those of smoke runs."""
    names = ((path, _NAME.fullmatch(path.name)) for path in folder.glob("*.json"))
    return sorted(path for path, match in names if match and (match[1] or "native") == level)


def gathered(paths: Sequence[Path]) -> dict[str, Any]:
    """Merge the results of several days: of each scenario the newest, with its date, and of the start the newest. `days` are the files."""
    together: dict[str, Any] = {}
    days = [load(path) for path in paths]
    for day in days:
        for part in ("speed", "length", "quality"):
            day[part] = {name: {"date": day["date"], **each} for name, each in day.get(part, {}).items()}
        together = merge(together, day)
    return {**together, "days": days} if days else {}
