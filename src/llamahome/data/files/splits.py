"""Which split and subset of a data set is read, which split is for evaluation, and which are left alone; all of it is reported.

Without a choice (data.split, data.subset) train is read, or for evaluation test or validation. A data set of several subsets without a
default is refused, because their rows may be of different kinds. A folder that names no splits is read whole.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llamahome.config.schema import DataConfig
from llamahome.data.files.split_files import TEST, TRAIN, VALIDATION, Missing, SplitFile, SplitLayout, by_split, role_of, stem_of, words_of
from llamahome.errors import DataError, Problem
from llamahome.units import many

ALL = "all"
_CODES = (
    "afarazbebgbnbscacscydadeeleneseteufafifrgaglguhehihrhuhyidisitjakakkkmknkoltlvmkmlmnmrmsmynenlnopapl"
    "psptroruskslsqsrsvswtatethtltrukuruzvizh"
)
_LANGUAGES = frozenset(_CODES[at : at + 2] for at in range(0, len(_CODES), 2))
"""Codes of ISO 639-1."""
_PURPOSES = frozenset(("sft", "dpo", "pref", "prefs", "preference", "preferences", "rm", "reward", "gen", "rl", "ppo", "kto", "orpo"))
_NO_SUBSET = frozenset(
    ("data", "dataset", "set", "split", "partial", "part", "parts", "shard", "chunk", "batch", "file", "v", "version", "of")
)


@dataclass(frozen=True)
class Wanted:
    """What is to be read of a data set with splits."""

    split: str | None = None
    subset: str | None = None
    prefer: tuple[str, ...] = (TRAIN,)
    """Without a choice, the first of these that exists is read."""
    required: bool = True
    """Whether a choice is refused if there is nothing to choose from."""

    @property
    def chosen(self) -> bool:
        """Whether a split or a subset was chosen."""
        return self.split is not None or self.subset is not None


TO_TRAIN = Wanted()
TO_EVALUATE = (VALIDATION, TEST)
"""Preferred for evaluation during training."""
TO_MEASURE = (TEST, VALIDATION)
"""Preferred to measure a finished model."""
EVERYTHING = Wanted(ALL, ALL)


def to_train(data: DataConfig) -> Wanted:
    """What these settings train on."""
    return Wanted(data.split, data.subset)


def to_evaluate(data: DataConfig) -> Wanted:
    """What these settings read of data.eval_path; data.split is about the rows to train on."""
    return Wanted(None, data.subset, TO_EVALUATE, required=False)


def to_measure(data: DataConfig) -> Wanted:
    """What these settings measure a finished model on."""
    return Wanted(data.split, data.subset, TO_MEASURE)


def evaluation_paths(data: DataConfig, split: tuple[str, ...]) -> tuple[tuple[str, ...] | None, str]:
    """The rows to evaluate on if `split` is the validation split, None if they are held out; and why the split is not used."""
    if data.eval_path is not None:
        return (data.eval_path,), f"data.eval_path is {data.eval_path}, so the validation split is left alone" if split else ""
    if split and data.eval_split != "auto":
        return None, f"data.eval_split is {data.eval_split:g}, so the validation split is left alone"
    return split or None, ""


@dataclass(frozen=True)
class Choice:
    """The files to read of a data set with splits."""

    files: tuple[str, ...]
    evaluation: tuple[str, ...] = ()
    """Those of the validation split, if another one is read."""
    apart: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Splits that are left alone."""
    note: str = ""


def choose(path: str, layout: SplitLayout | None, files: Sequence[str], wanted: Wanted) -> Choice | None:
    """The files to read; None if the folder has no splits and is read whole. Raises DataError for a choice that does not exist."""
    if layout is None or wanted == EVERYTHING:
        return None
    layout = _with_named_subsets(_with_implied_train(layout), wanted.subset)
    roles = {role_of(file.split) for file in layout.files} - {None}
    if not wanted.chosen and not layout.declared and roles <= {TRAIN}:
        together = _read_together(layout, files)
        return Choice(tuple(files), note=f"{path}: {together}") if together else None
    candidates = _of_subset(path, layout, wanted)
    if wanted.split == ALL:
        return Choice(tuple(file.path for file in candidates))
    splits = by_split(candidates)
    name = _find_split(splits, wanted)
    missing = [each for each in layout.missing if each.subset in {file.subset for file in candidates}]
    _refuse_missing(path, layout.source, [each for each in missing if _is_wanted(each.split, name, wanted)])
    if name is None:
        _refuse_split(path, splits, wanted)
        if len(splits) == 1 and not layout.rest:
            only = next(iter(splits))
            note = "" if role_of(only) == TRAIN else f"{path}: {only} is the only split of it and is read"
            return Choice(tuple(splits[only]), note=note)
        listed = ", ".join(f"{split} ({many(len(paths), 'file')})" for split, paths in splits.items())
        note = f"{path}: no split of it is {' or '.join(wanted.prefer)}, so all are read: {listed}; --set data.split=NAME reads one"
        return Choice(tuple(files) if wanted.subset is None else tuple(file.path for file in candidates), note=note)
    validation = None if role_of(name) == VALIDATION or wanted.prefer != (TRAIN,) else _split_for(splits, VALIDATION)
    apart = tuple((split, tuple(paths)) for split, paths in splits.items() if split not in (name, validation))
    evaluation = tuple(splits[validation]) if validation is not None else ()
    notes = (_note(path, layout, candidates, (name, validation), missing), _read_together(layout, splits[name]))
    return Choice(tuple(splits[name]), evaluation, apart, "; ".join(filter(None, notes)))


def require_splits(wanted: Wanted, paths: Sequence[str]) -> None:
    """DataError if a split or subset was chosen, because these paths have none."""
    what, choice = ("split", wanted.split) if wanted.split is not None else ("subset", wanted.subset)
    if wanted.required and choice not in (None, ALL):
        raise _unknown(what, str(choice), [], ", ".join(paths))


def _with_implied_train(layout: SplitLayout) -> SplitLayout:
    """If files are called nothing but `test` or `dev`, those beside them that name no split are the ones to train on."""
    if any(role_of(file.split) == TRAIN for file in layout.files) or layout.declared or not layout.rest:
        return layout
    if not all(file.alone for file in layout.files):
        return SplitLayout(layout.source, (), layout.rest, declared=False)
    train = (SplitFile(path, TRAIN) for path in layout.rest)
    return SplitLayout(f"{layout.source} (what names none is train)", (*train, *layout.files))


def _with_named_subsets(layout: SplitLayout, subset: str | None) -> SplitLayout:
    """The layout with subsets from the file names (`en.train.jsonl`), if these leave no doubt or `subset` is one of them."""
    named = _subsets_by_name(layout)
    names = {*named.values()}
    if len(names) < 2:
        return layout
    splits: dict[str, set[str]] = {}
    for file in layout.files:
        splits.setdefault(file.split, set()).add(named[file.path])
    same_in_every_split = len(splits) > 1 and all(present == names for present in splits.values())
    if names <= _LANGUAGES or names <= _PURPOSES or same_in_every_split or (subset or "").casefold() in names:
        return replace(layout, files=tuple(replace(file, subset=named[file.path]) for file in layout.files), declared=True)
    return layout


def _read_together(layout: SplitLayout, files: Sequence[str]) -> str:
    """A note about files that may be of several subsets and are read together; "" if their names say nothing."""
    names = sorted({name for path, name in _subsets_by_name(layout).items() if path in files} - {""})
    if len(names) < 2:
        return ""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} are read together; --set data.subset={names[0]} reads one"


def _subsets_by_name(layout: SplitLayout) -> Mapping[str, str]:
    """The subset in each file's name; empty if folders or the data set itself name subsets, or if some file's name has none."""
    if layout.declared or layout.rest or any(file.subset for file in layout.files):
        return {}
    named = {file.path: _subset_of_name(file.path) for file in layout.files}
    return named if all(named.values()) else {}


def _subset_of_name(path: str) -> str:
    """What the name says beside its split; "" for numbers, parts and versions, and for a name without a split."""
    stem = stem_of(path)
    if role_of(stem) is None:
        return ""
    return "-".join(word for word in words_of(stem) if role_of(word) is None and word not in _NO_SUBSET and not word.isdigit())


def _of_subset(path: str, layout: SplitLayout, wanted: Wanted) -> list[SplitFile]:
    """The files of the chosen subset, or of the only or default one."""
    subsets: dict[str, list[SplitFile]] = {}
    for file in layout.files:
        subsets.setdefault(file.subset, []).append(file)
    if wanted.subset == ALL and ALL not in subsets:
        return list(layout.files)
    if wanted.subset is not None:
        chosen = next((name for name in subsets if name.casefold() == wanted.subset.casefold()), None)
        if chosen is None:
            raise _unknown("subset", wanted.subset, [name for name in subsets if name], path)
        return subsets[chosen]
    fitting = [name for name, files in subsets.items() if _find_split(by_split(files), wanted) is not None] or list(subsets)
    usual = [name for name in (layout.default, "", "default") if name in fitting]
    if len(fitting) > 1 and not usual:
        if wanted.split == ALL:
            return list(layout.files)
        names = ", ".join(fitting[:12]) + (f" and {len(fitting) - 12} more" if len(fitting) > 12 else "")
        message = f"there are {len(fitting)} subsets, and rows of one may differ from those of another: {names}"
        hint = f"--set data.subset={fitting[0]}   reads one, and all instead of its name every one"
        raise DataError(Problem(code="data.several-subsets", message=message, where=path, hint=hint))
    return subsets[usual[0] if usual else fitting[0]]


def _find_split(splits: Mapping[str, list[str]], wanted: Wanted) -> str | None:
    """The chosen split, or the first preferred one; None if there is none."""
    if wanted.split is None:
        return next((name for role in wanted.prefer if (name := _split_for(splits, role)) is not None), None)
    choice = wanted.split.casefold()
    exact = next((name for name in splits if name.casefold() == choice), None)
    role = role_of(choice)
    return exact or (_split_for(splits, role) if role is not None and choice.isalpha() else None)


def _refuse_split(path: str, splits: Mapping[str, list[str]], wanted: Wanted) -> None:
    """DataError if a chosen split does not exist, or if several splits are for the preferred role."""
    if wanted.split is not None:
        raise _unknown("split", wanted.split, list(splits), path)
    for role in wanted.prefer:
        names = sorted((name for name in splits if role_of(name) == role), key=lambda name: "sft" not in words_of(name))
        if names:
            message = f"{len(names)} splits are called {role}: {', '.join(names)}"
            hint = f"--set data.split={names[0]}   reads one"
            raise DataError(Problem(code="data.several-splits", message=message, where=path, hint=hint))


def _split_for(splits: Mapping[str, list[str]], role: str) -> str | None:
    """The split of this very name, or the only one whose name says this role."""
    names = [name for name in splits if role_of(name) == role]
    return role if role in names else "eval" if "eval" in names else names[0] if len(names) == 1 else None


def _is_wanted(split: str, name: str | None, wanted: Wanted) -> bool:
    """Whether the split is the one that is read, or would be if it was whole."""
    if name is not None:
        return split == name
    return role_of(split) == wanted.prefer[0] if wanted.split is None else split.casefold() == wanted.split.casefold()


def _refuse_missing(path: str, source: str, missing: Sequence[Missing]) -> None:
    """DataError with every file of the split to read that the data set names and does not hold."""
    problems = []
    for each in missing:
        why = "and no rows are read from it" if each.is_there else "and it is not there"
        message = f"{source} names this for the split {each.split}, {why}"
        hint = None if each.is_there else "copy or download the data set again"
        problems.append(Problem(code="data.not-found", message=message, where=str(Path(path) / each.path), hint=hint))
    if problems:
        raise DataError(problems)


def _note(
    path: str,
    layout: SplitLayout,
    candidates: Sequence[SplitFile],
    chosen: tuple[str, str | None],
    missing: Sequence[Missing],
) -> str:
    """What is read, evaluated on, left alone and missing, in one line."""
    splits = by_split(candidates)
    name, validation = chosen
    others = [split for split in splits if split not in (name, validation)]
    parts = [f"{name} is read ({_files(splits[name], path)})"]
    if validation is not None:
        parts.append(f"{validation} is there to evaluate on ({_files(splits[validation], path)})")
    parts += [f"{split} is left alone ({_files(splits[split], path)})" for split in others]
    parts += [f"{each.path}, which it names for {each.split}, {'is not read' if each.is_there else 'is not there'}" for each in missing]
    read = {file.subset for file in candidates}
    unread = sorted({file.subset for file in layout.files} - read)
    if unread:
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        subset = next(iter(read)) if len(read) == 1 else ""
        parts.append(f"of the subsets {subset or 'the first folder'} is read, not {', '.join(unread[:3])}{more} (data.subset)")
    if layout.rest:
        parts.append(f"{many(len(layout.rest), 'file')} of no split not read")
    return f"{path}: splits by {layout.source}: {'; '.join(parts)}" if len(parts) > 1 else ""


def _files(paths: Sequence[str], folder: str) -> str:
    if len(paths) > 1:
        return f"{len(paths):,} files"
    return os.path.relpath(paths[0], folder) if Path(folder).is_dir() else Path(paths[0]).name


def _unknown(what: str, choice: str, names: Sequence[str], path: str) -> DataError:
    near = next(iter([*difflib.get_close_matches(choice, names, n=1), *(name for name in names if name == TRAIN), *names]), None)
    message = f"there is no {what} {choice}; there {'is' if len(names) == 1 else 'are'} {', '.join(names) or 'none'}"
    code = "data.unknown-split" if what == "split" else "data.unknown-subset"
    return DataError(Problem(code=code, message=message, where=path, hint=f"--set data.{what}={near or 'null'}"))
