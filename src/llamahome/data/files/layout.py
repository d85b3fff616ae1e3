"""Which file of a folder belongs to which split and subset: told by what `save_to_disk` wrote, by a data set's README, or by names.

A split is a whole word of a name (`train.jsonl`, `foo-test.csv`, `dev/`, `train-00000-of-00002.parquet`), never a part of one:
`latest.jsonl`, `contest.jsonl` and `testimonials.jsonl` name none. Nothing is opened but the small files that describe a data set.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llamahome.config.yamltext import YamlTrouble, read_value
from llamahome.data.files.kinds import ending
from llamahome.errors import DataError, Problem

TRAIN, VALIDATION, TEST = "train", "validation", "test"
_WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), VALIDATION),
    **dict.fromkeys(("test", "testing"), TEST),
}
_FILLERS = {"data", "dataset", "set", "split", "partial"}
_SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}(-[0-9a-f]{8,})?")
DESCRIBING = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")


@dataclass(frozen=True)
class Filed:
    """A file and where it belongs."""

    path: str
    split: str
    subset: str = ""
    alone: bool = True
    """Whether the name says nothing but the split, as `test.jsonl` and `dev/` do."""


@dataclass(frozen=True)
class Layout:
    """The files of a folder by split and subset."""

    by: str
    """What tells: a file's name, or words."""
    filed: tuple[Filed, ...]
    rest: tuple[str, ...] = ()
    """Files that name no split."""
    default: str | None = None
    """The subset that the data set itself calls its default."""
    declared: bool = True
    """Whether the data set says it itself, or file names as the hub writes them do; otherwise names are taken for it."""


def role_of(split: str) -> str | None:
    """What a split is for, by the words of its name: train, validation or test; None where they say nothing or two things."""
    roles = {_WORDS[word] for word in _words(split) if word in _WORDS}
    return next(iter(roles)) if len(roles) == 1 else None


def lay_out(folder: str, files: Sequence[str]) -> tuple[Layout | None, tuple[str, ...]]:
    """How the data files of the folder are laid out, None when nothing says so; and the files that are rows of it at all.

    Raises DataError when a file that the data set names is not there.
    """
    _require_whole({Path(path).parent for path in files})
    files = _without_leftovers(files)
    saved = _saved(folder, files)
    if saved is not None:
        return saved, tuple(files)
    return _described(folder, files) or _named(folder, files), tuple(files)


def _words(name: str) -> list[str]:
    words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return [word.rstrip("0123456789") or word for word in words if word]


def _without_leftovers(files: Sequence[str]) -> list[str]:
    """The files without what an earlier `map` left: beside a state.json (`save_to_disk`) only the Arrow files that it names are rows."""
    named: dict[Path, list[str] | None] = {}
    kept = []
    for path in files:
        folder = Path(path).parent
        if ending(path) == ".arrow" and folder not in named:
            listed = _read_json(folder / "state.json").get("_data_files")
            named[folder] = _file_names(listed) if isinstance(listed, list) else None
        names = named.get(folder) if ending(path) == ".arrow" else None
        if names is None or Path(path).name in names:
            kept.append(path)
    return kept


def _file_names(listed: Iterable[object]) -> list[str]:
    return [file["filename"] for file in listed if isinstance(file, dict) and isinstance(file.get("filename"), str)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _saved(folder: str, files: Sequence[str]) -> Layout | None:
    """The splits of every dataset_dict.json in or below the folder."""
    filed, rest, told = [], [], {}
    for path in files:
        split = Path(path).parent
        if split.parent not in told:
            told[split.parent] = _read_json(split.parent / "dataset_dict.json").get("splits")
        names = told[split.parent]
        within = split != Path(folder) and isinstance(names, list) and split.name in names
        if within:
            filed.append(Filed(path, split.name, _subset(Path(_inside(split.parent, folder)).parts)))
        else:
            rest.append(path)
    return Layout("dataset_dict.json", tuple(filed), tuple(rest)) if filed else None


def _require_whole(folders: Iterable[Path]) -> None:
    """DataError for files that a state.json names and that are not there."""
    problems = []
    for folder in sorted(folders):
        listed = _read_json(folder / "state.json").get("_data_files")
        for name in _file_names(listed) if isinstance(listed, list) else ():
            if not (folder / name).is_file():
                message = f"{folder / 'state.json'} names this file of the data set, and it is not there"
                problems.append(Problem(code="data.not-found", message=message, where=str(folder / name), hint="copy the folder again"))
    if problems:
        raise DataError(problems)


def _described(folder: str, files: Sequence[str]) -> Layout | None:
    """What the front matter of the README says, as data sets of the hub have it."""
    inside = {_inside(path, folder): path for path in files}
    filed: dict[tuple[str, str], Filed] = {}
    default = None
    for config in _configs(Path(folder) / "README.md"):
        name = str(config.get("config_name", "default"))
        if config.get("default") is True:
            default = name
        for split, patterns in _patterns(config.get("data_files")):
            for relative, path in inside.items():
                if any(_matches(pattern, relative, str(config.get("data_dir") or "")) for pattern in patterns):
                    filed.setdefault((name, path), Filed(path, split, name))
    taken = {each.path for each in filed.values()}
    rest = tuple(path for path in files if path not in taken)
    return Layout("README.md", tuple(filed.values()), rest, default) if filed else None


def _configs(readme: Path) -> list[dict[str, Any]]:
    try:
        text = readme.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    front = re.match(r"---\r?\n(.*?)\r?\n---\s*(\n|$)", text, re.DOTALL)
    try:
        told = read_value(front[1]) if front else None
    except YamlTrouble:  # the names of the files still tell
        return []
    listed = told.get("configs") if isinstance(told, dict) else None
    return [config for config in listed if isinstance(config, dict)] if isinstance(listed, list) else []


def _patterns(told: object) -> list[tuple[str, list[str]]]:
    """Splits and their patterns; patterns without a split are those of train, as the hub takes them."""
    if isinstance(told, str):
        return [(TRAIN, [told])]
    if not isinstance(told, list):
        return []
    found: list[tuple[str, list[str]]] = []
    for part in told:
        if isinstance(part, str):
            found.append((TRAIN, [part]))
        elif isinstance(part, dict):
            paths = part.get("path") if isinstance(part.get("path"), list) else [part.get("path")]
            patterns = [each for each in paths or () if isinstance(each, str)]
            found.append((str(part.get("split", TRAIN)), patterns))
    return found


def _matches(pattern: str, relative: str, folder: str) -> bool:
    """Whether the glob means the file, `**` any number of folders; the name of a folder means all in it."""
    whole = str(PurePosixPath(folder, pattern))
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", whole)
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    expression = "".join(words.get(part, re.escape(part)) for part in parts)
    return re.fullmatch(f"{expression}(?:/.*)?", relative) is not None


def _named(folder: str, files: Sequence[str]) -> Layout | None:
    """What the names of files and folders below the folder say."""
    filed, rest, sharded = [], [], False
    for path in files:
        found = _by_name(path, PurePosixPath(_inside(path, folder)).parts)
        if found is None:
            rest.append(path)
        else:
            filed.append(found)
            sharded = sharded or _SHARD.fullmatch(_stem(path)) is not None
    return Layout("the names of its files", tuple(filed), tuple(rest), declared=sharded) if filed else None


def _by_name(path: str, parts: Sequence[str]) -> Filed | None:
    """What a folder of this very name says, or else the file's name, or else a folder that has a split as one of its words."""
    folders = [(number, _words(part), _alone(part)) for number, part in enumerate(parts[:-1]) if role_of(part) is not None]
    whole = next(((number, words) for number, words, alone in folders if alone), None)
    if whole is not None:
        return Filed(path, _canonical(whole[1]), _subset(parts[: whole[0]]))
    subset, stem = _subset(parts[:-1]), _stem(path)
    shard = _SHARD.fullmatch(stem)
    name = shard["split"] if shard else stem
    if role_of(name) is not None:
        return Filed(path, name if shard and not _alone(name) else _canonical(_words(name)), subset, _alone(name))
    if folders:
        number, words, _ = folders[0]
        return Filed(path, _canonical(words), _subset(parts[:number]), alone=False)
    return None


def _alone(name: str) -> bool:
    """Whether the name says nothing but a split."""
    return len([word for word in _words(name) if not word.isdigit() and word not in _FILLERS]) == 1


def _canonical(words: Sequence[str]) -> str:
    """The usual name of a split: `valid`, `val` and `dev` are validation, `eval` keeps its name beside it."""
    word = next(word for word in words if word in _WORDS)
    return "eval" if word in ("eval", "evaluation") else _WORDS[word]


def _stem(path: str) -> str:
    """The name without its endings: `train` of train.jsonl.gz, `train-v1.1` of train-v1.1.json."""
    name = Path(path).name
    suffix = ending(path)
    return name[: name.lower().rindex(suffix)] if suffix else name


def _subset(parts: Iterable[str]) -> str:
    return "/".join(part for part in parts if part.lower() != "data")


def _inside(path: str | Path, folder: str) -> str:
    return Path(path).relative_to(folder).as_posix()


def by_split(filed: Iterable[Filed]) -> Mapping[str, list[str]]:
    """The files of each split."""
    splits: dict[str, list[str]] = {}
    for each in filed:
        splits.setdefault(each.split, []).append(each.path)
    return splits
