"""Which file of a folder belongs to which split and subset, according to `save_to_disk`, to a data set's README, or to file names.

A split is a whole word of a name (`train.jsonl`, `foo-test.csv`, `dev/`, `train-00000-of-00002.parquet`), never a part of one:
`latest.jsonl`, `contest.jsonl` and `testimonials.jsonl` name none. Only the small files that describe a data set are opened.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from llamahome.data.files.kinds import ending
from llamahome.data.files.readme import README, Subset, has_wildcard, matches, subsets_in
from llamahome.durable import read_object
from llamahome.errors import DataError, Problem

TRAIN, VALIDATION, TEST = "train", "validation", "test"
_WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev", "devel", "development", "eval", "evaluation"), VALIDATION),
    **dict.fromkeys(("test", "testing", "holdout", "heldout"), TEST),
}
_FILLERS = {"data", "dataset", "set", "split", "partial"}
_SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]{8,})?")
DESCRIBING = (README, "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
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
class Missing:
    """A file or pattern that the data set names for a split, from which no rows can be read."""

    split: str
    subset: str
    path: str
    """Within the folder of the data set."""
    is_there: bool
    """Whether there is such a file, of a kind that is not read."""


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
    missing: tuple[Missing, ...] = ()
    """What the data set declares and does not hold."""


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
    declared: dict[Path, list[str]] = {}
    for path in files:
        split = Path(path).parent
        if split.parent not in declared:
            names = read_object(split.parent / "dataset_dict.json").get("splits")
            declared[split.parent] = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
        if split != Path(folder) and split.name in declared[split.parent]:
            split_files.append(SplitFile(path, split.name, _subset(Path(_inside(split.parent, folder)).parts)))
        else:
            rest.append(path)
    present = {Path(file.path).parent for file in split_files}
    missing = [
        Missing(name, _subset(Path(_inside(parent, folder)).parts), _inside(parent / name, folder), False)
        for parent in sorted({split.parent for split in present})
        for name in declared[parent]
        if parent / name not in present
    ]
    return SplitLayout("dataset_dict.json", tuple(split_files), tuple(rest), missing=tuple(missing)) if split_files else None


def _described(folder: str, files: Sequence[str]) -> SplitLayout | None:
    """The splits in the front matter of the README, as data sets of the hub have it."""
    inside = {_inside(path, folder): path for path in files}
    split_files: dict[tuple[str, str], SplitFile] = {}
    missing: list[Missing] = []
    subsets = subsets_in(folder, split=TRAIN)
    for subset in subsets:
        found = _of_patterns(subset, inside) if subset.patterns else _of_data_dir(subset, inside)
        for file in found:
            split_files.setdefault((subset.name, file.path), file)
        missing += _missing(subset, inside, folder)
    known = {file.path for file in split_files.values()}
    rest = tuple(path for path in files if path not in known)
    default = next((subset.name for subset in subsets if subset.is_default), None)
    return SplitLayout(README, tuple(split_files.values()), rest, default, missing=tuple(missing)) if split_files else None


def _of_patterns(subset: Subset, inside: Mapping[str, str]) -> list[SplitFile]:
    """The files that the patterns of the subset match."""
    return [
        SplitFile(path, split, subset.name)
        for split, patterns in subset.patterns.items()
        for relative, path in inside.items()
        if any(matches(pattern, relative, subset.folder) for pattern in patterns)
    ]


def _of_data_dir(subset: Subset, inside: Mapping[str, str]) -> list[SplitFile]:
    """The files below the subset's folder, by the splits that their names say; all of them are train if none says one."""
    if not subset.folder:
        return []
    below = {path: relative for relative, path in inside.items() if matches("**", relative, subset.folder)}
    named = [_by_name(path, PurePosixPath(relative).relative_to(PurePosixPath(subset.folder)).parts) for path, relative in below.items()]
    files = [SplitFile(file.path, file.split, subset.name) for file in named if file is not None]
    return files or [SplitFile(path, TRAIN, subset.name) for path in below]


def _missing(subset: Subset, inside: Mapping[str, str], folder: str) -> list[Missing]:
    """The files that the subset names and that hold no rows; patterns that match nothing, if no other of the split does."""
    missing = []
    for split, patterns in subset.patterns.items():
        unmatched = [pattern for pattern in patterns if not any(matches(pattern, relative, subset.folder) for relative in inside)]
        for pattern in unmatched:
            if len(unmatched) == len(patterns) or not has_wildcard(pattern):
                path = str(PurePosixPath(subset.folder, pattern))
                missing.append(Missing(split, subset.name, path, Path(folder, path).exists()))
    return missing


def missing_parts(files: Iterable[str]) -> list[str]:
    """A sentence about each set of parts (`train-00000-of-00003.parquet`) of which some are not among the files."""
    found: dict[tuple[str, str, int], set[int]] = {}
    for path in files:
        part = _SHARD.fullmatch(stem_of(path))
        if part is not None:
            found.setdefault((str(Path(path).parent), part["split"], int(part["count"])), set()).add(int(part["number"]))
    return [
        f"{Path(folder, name)}: {count - len(numbers):,} of {count:,} parts missing, so their rows are not read"
        for (folder, name, count), numbers in found.items()
        if len(numbers) < count
    ]


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
