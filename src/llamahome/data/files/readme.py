"""Subsets and splits in the front matter of a data set's README.md, as the Hugging Face hub reads it.

A file that is not text, or front matter that is not YAML, declares nothing. Source: the hub's "Manual configuration" of data sets.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from llamahome.config.yamltext import YamlTrouble, read_value

README = "README.md"
_FRONT_MATTER = re.compile(r"---\r?\n(.*?)\r?\n---\s*(\n|$)", re.DOTALL)
_WILDCARDS = re.compile(r"(\*\*/|\*\*|\*|\?|\[!?[^\]/]+\]|\{[^{}]*\})")


@dataclass(frozen=True)
class Subset:
    """A configuration of the README."""

    name: str
    folder: str
    """Where its files are; "" for the folder of the README."""
    is_default: bool
    patterns: Mapping[str, tuple[str, ...]]
    """The patterns of each split, within the folder; of none, the names of the files in the folder say their splits."""


def subsets_in(folder: str, *, split: str) -> list[Subset]:
    """The configurations in the folder's README.md; patterns without a split are those of `split`."""
    return [
        Subset(
            str(config.get("config_name", "default")),
            str(config.get("data_dir") or ""),
            config.get("default") is True,
            _patterns(config.get("data_files"), split),
        )
        for config in _configs(Path(folder) / README)
    ]


def matches(pattern: str, relative: str, folder: str) -> bool:
    """Whether the glob matches the file; `**` is any number of folders, and the name of a folder matches all in it."""
    return re.fullmatch(f"{_expression(str(PurePosixPath(folder, pattern)))}(?:/.*)?", relative) is not None


def has_wildcard(pattern: str) -> bool:
    """Whether the pattern may match more than one file."""
    return _WILDCARDS.search(pattern) is not None


@lru_cache(maxsize=256)
def _expression(pattern: str) -> str:
    """The glob as a regular expression."""
    return "".join(map(_translated, _WILDCARDS.split(pattern)))


def _translated(part: str) -> str:
    wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    if part in wildcards:
        return wildcards[part]
    if part.startswith("{") and part.endswith("}"):
        return f"(?:{'|'.join(map(_expression, part[1:-1].split(',')))})"
    if part.startswith("[") and part.endswith("]"):
        characters = re.sub(r"([\\^\[])", r"\\\1", part[1:-1])
        return f"[^{characters[1:]}]" if characters.startswith("!") else f"[{characters}]"
    return re.escape(part)


def _configs(readme: Path) -> list[dict[str, Any]]:
    try:
        front_matter = _FRONT_MATTER.match(readme.read_text(encoding="utf-8-sig", errors="replace"))
        value = read_value(front_matter[1]) if front_matter else None
    except (OSError, ValueError, YamlTrouble):
        return []
    configs = value.get("configs") if isinstance(value, dict) else None
    configs = [configs] if isinstance(configs, dict) else configs
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _patterns(data_files: object, split: str) -> dict[str, tuple[str, ...]]:
    if isinstance(data_files, str):
        return {split: (data_files,)}
    if isinstance(data_files, dict):  # not as the hub asks for it, but its meaning is clear
        data_files = [{"split": name, "path": path} for name, path in data_files.items()]
    patterns: dict[str, tuple[str, ...]] = {}
    for entry in data_files if isinstance(data_files, list) else ():
        written = entry if isinstance(entry, dict) else {"path": entry}
        paths = written.get("path") if isinstance(written.get("path"), list) else [written.get("path")]
        name = str(written.get("split", split))
        patterns[name] = (*patterns.get(name, ()), *(path for path in paths or () if isinstance(path, str)))
    return patterns
