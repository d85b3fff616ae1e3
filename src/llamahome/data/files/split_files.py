"""Which file of a folder belongs to which split and subset, according to `save_to_disk`, to a data set's README, or to file names.

A split is a whole word of a name (`train.jsonl`, `foo-test.csv`, `dev/`, `train-00000-of-00002.parquet`), never a part of one:
`latest.jsonl`, `contest.jsonl` and `testimonials.jsonl` name none. Only the small files that describe a data set are opened.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llamahome.config.yamltext import YamlTrouble, read_value
from llamahome.data.files.kinds import ending
from llamahome.durable import read_object
from llamahome.errors import DataError, Problem

TRAIN, VALIDATION, TEST = "train", "validation", "test"
_WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev", "devel", "development", "eval", "evaluation"), VALIDATION),
    **dict.fromkeys(("test", "testing", "holdout", "heldout"), TEST),
}
_FILLERS = {"data", "dataset", "set", "split", "partial"}
_SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}(-[0-9a-f]{8,})?")
_FRONT_MATTER = re.compile(r"---\r?\n(.*?)\r?\n---\s*(\n|$)", re.DOTALL)
DESCRIBING = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
"""Files that describe a data set."""


@dataclass(frozen=True)
class SplitFile:
    """A file with its split and subset."""

    path: str
    split: str
    subset: str = ""
    alone: bool = True
    """Whether the name says nothing but the split, as `test.jsonl` and `dev/` do."""


@dataclass(frozen=True)
class SplitLayout:
    """The files of a folder by split and subset."""

    source: str
    """Where the layout is from: a file's name, or words."""
    files: tuple[SplitFile, ...]
    rest: tuple[str, ...] = ()
    """Files that name no split."""
    default: str | None = None
    """The subset that the data set itself calls its default."""
    declared: bool = True
    """Whether the data set declares the splits, or its file names are those that the hub writes; otherwise the names are a guess."""


def find_splits(folder: str, files: Sequence[str]) -> tuple[SplitLayout | None, tuple[str, ...]]:
    """The layout of the data files of the folder, None if nothing names splits; and the files that hold rows at all.

    Raises DataError if a file that the data set names is missing.
    """
    files = _without_leftovers(files)
    return _saved(folder, files) or _described(folder, files) or _named(folder, files), tuple(files)


def role_of(split: str) -> str | None:
    """What a split is for, by the words of its name: train, validation or test; None if they name none or two of them."""
    roles = {_WORDS[word] for word in words_of(split) if word in _WORDS}
    return next(iter(roles)) if len(roles) == 1 else None


def words_of(name: str) -> list[str]:
    """The words of a name in lower case, without the numbers at their ends."""
    words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return [word.rstrip("0123456789") or word for word in words if word]


def stem_of(path: str) -> str:
    """The name without its endings: `train` of train.jsonl.gz, `train-v1.1` of train-v1.1.json."""
    name, suffix = Path(path).name, ending(path)
    return name[: name.lower().rindex(suffix)] if suffix else name


def by_split(files: Iterable[SplitFile]) -> Mapping[str, list[str]]:
    """The paths of each split."""
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(file.split, []).append(file.path)
    return splits


def _without_leftovers(files: Sequence[str]) -> list[str]:
    """The files without those that an earlier `map` left: if a state.json (`save_to_disk`) names Arrow files, only those hold rows."""
    named: dict[Path, list[str] | None] = {}
    problems = []
    for folder in sorted({Path(path).parent for path in files}):
        listed = read_object(folder / "state.json").get("_data_files")
        entries = listed if isinstance(listed, list) else []
        listed_names = [entry["filename"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("filename"), str)]
        named[folder] = listed_names if isinstance(listed, list) else None
        for name in listed_names:
            if not (folder / name).is_file():
                message = f"{folder / 'state.json'} names this file of the data set, and it is not there"
                problems.append(Problem(code="data.not-found", message=message, where=str(folder / name), hint="copy the folder again"))
    if problems:
        raise DataError(problems)
    return [path for path in files if ending(path) != ".arrow" or (names := named[Path(path).parent]) is None or Path(path).name in names]


def _saved(folder: str, files: Sequence[str]) -> SplitLayout | None:
    """The splits of every dataset_dict.json in or below the folder."""
    split_files, rest = [], []
    declared: dict[Path, object] = {}
    for path in files:
        split = Path(path).parent
        if split.parent not in declared:
            declared[split.parent] = read_object(split.parent / "dataset_dict.json").get("splits")
        names = declared[split.parent]
        if split != Path(folder) and isinstance(names, list) and split.name in names:
            split_files.append(SplitFile(path, split.name, _subset(Path(_inside(split.parent, folder)).parts)))
        else:
            rest.append(path)
    return SplitLayout("dataset_dict.json", tuple(split_files), tuple(rest)) if split_files else None


def _described(folder: str, files: Sequence[str]) -> SplitLayout | None:
    """The splits in the front matter of the README, as data sets of the hub have it."""
    inside = {_inside(path, folder): path for path in files}
    split_files: dict[tuple[str, str], SplitFile] = {}
    default = None
    for config in _configs(Path(folder) / "README.md"):
        name = str(config.get("config_name", "default"))
        default = name if config.get("default") is True else default
        for split, patterns in _patterns(config.get("data_files")):
            for relative, path in inside.items():
                if any(_matches(pattern, relative, str(config.get("data_dir") or "")) for pattern in patterns):
                    split_files.setdefault((name, path), SplitFile(path, split, name))
    known = {file.path for file in split_files.values()}
    rest = tuple(path for path in files if path not in known)
    return SplitLayout("README.md", tuple(split_files.values()), rest, default) if split_files else None


def _configs(readme: Path) -> list[dict[str, Any]]:
    try:
        front_matter = _FRONT_MATTER.match(readme.read_text(encoding="utf-8"))
        value = read_value(front_matter[1]) if front_matter else None
    except (OSError, ValueError, YamlTrouble):  # then the names of the files decide
        return []
    configs = value.get("configs") if isinstance(value, dict) else None
    configs = [configs] if isinstance(configs, dict) else configs
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _patterns(data_files: object) -> list[tuple[str, list[str]]]:
    """Splits and their patterns; patterns without a split are those of train, as on the hub."""
    if isinstance(data_files, str):
        return [(TRAIN, [data_files])]
    if isinstance(data_files, dict):  # not as the hub asks for it, but its meaning is clear
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    patterns: list[tuple[str, list[str]]] = []
    for entry in data_files if isinstance(data_files, list) else ():
        if isinstance(entry, str):
            patterns.append((TRAIN, [entry]))
        elif isinstance(entry, dict):
            paths = entry.get("path") if isinstance(entry.get("path"), list) else [entry.get("path")]
            patterns.append((str(entry.get("split", TRAIN)), [path for path in paths or () if isinstance(path, str)]))
    return patterns


def _matches(pattern: str, relative: str, folder: str) -> bool:
    """Whether the glob matches the file; `**` is any number of folders, and the name of a folder matches all in it."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", str(PurePosixPath(folder, pattern)))
    wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    expression = "".join(wildcards.get(part, re.escape(part)) for part in parts)
    return re.fullmatch(f"{expression}(?:/.*)?", relative) is not None


def _named(folder: str, files: Sequence[str]) -> SplitLayout | None:
    """The splits that the names of files and folders below the folder say."""
    named = {path: _by_name(path, PurePosixPath(_inside(path, folder)).parts) for path in files}
    split_files = tuple(file for file in named.values() if file is not None)
    sharded = any(_SHARD.fullmatch(stem_of(file.path)) for file in split_files)
    rest = tuple(path for path, file in named.items() if file is None)
    return SplitLayout("the names of its files", split_files, rest, declared=sharded) if split_files else None


def _by_name(path: str, parts: Sequence[str]) -> SplitFile | None:
    """The split in the name of a folder that says nothing else, or else in the file's name, or else among the words of a folder."""
    folders = [(number, words_of(part), _says_only_split(part)) for number, part in enumerate(parts[:-1]) if role_of(part) is not None]
    for number, words, alone in folders:
        if alone:
            return SplitFile(path, _canonical(words), _subset(parts[:number]))
    shard = _SHARD.fullmatch(stem_of(path))
    name = shard["split"] if shard else stem_of(path)
    if role_of(name) is not None:
        alone = _says_only_split(name)
        return SplitFile(path, name if shard and not alone else _canonical(words_of(name)), _subset(parts[:-1]), alone)
    if folders:
        number, words, _ = folders[0]
        return SplitFile(path, _canonical(words), _subset(parts[:number]), alone=False)
    return None


def _says_only_split(name: str) -> bool:
    return len([word for word in words_of(name) if not word.isdigit() and word not in _FILLERS]) == 1


def _canonical(words: Sequence[str]) -> str:
    """The usual name of a split: `valid`, `val` and `dev` are validation; `eval` keeps its name."""
    word = next(word for word in words if word in _WORDS)
    return "eval" if word in ("eval", "evaluation") else _WORDS[word]


def _subset(parts: Iterable[str]) -> str:
    return "/".join(part for part in parts if part.lower() != "data")


def _inside(path: str | Path, folder: str) -> str:
    return Path(path).relative_to(folder).as_posix()
