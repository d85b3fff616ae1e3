"""Which split of a data set is read, which is there to evaluate on, and which is left alone; all of it is said.

Without a choice (data.split, data.subset) train is read, or of what is to be evaluated test or validation. A data set of several subsets
without a default one is refused, for rows of different kinds are easily taken for one. Folders that name no splits are read whole.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamahome.config.schema import DataConfig
from llamahome.data.files.layout import TEST, TRAIN, VALIDATION, Filed, Layout, by_split, role_of
from llamahome.errors import DataError, Problem
from llamahome.units import many

ALL = "all"


@dataclass(frozen=True)
class Wanted:
    """What is to be read of a data set with splits."""

    split: str | None = None
    subset: str | None = None
    prefer: tuple[str, ...] = (TRAIN,)
    """What is read without a choice, the first of these that there is."""
    required: bool = True
    """Whether a choice is refused where there is nothing to choose."""

    @property
    def chosen(self) -> bool:
        """Whether somebody asked for a split or a subset."""
        return self.split is not None or self.subset is not None


TO_TRAIN = Wanted()
TO_EVALUATE = (VALIDATION, TEST)
"""Preferred of data that is evaluated on during training."""
TO_MEASURE = (TEST, VALIDATION)
"""Preferred of data that a finished model is measured on."""
EVERYTHING = Wanted(ALL, ALL)


def to_train(data: DataConfig) -> Wanted:
    """What these settings train on."""
    return Wanted(data.split, data.subset)


def to_evaluate(data: DataConfig) -> Wanted:
    """What these settings read of data.eval_path; data.split is of the rows to train on."""
    return Wanted(None, data.subset, TO_EVALUATE, required=False)


def to_measure(data: DataConfig) -> Wanted:
    """What these settings measure a finished model on."""
    return Wanted(data.split, data.subset, TO_MEASURE)


@dataclass(frozen=True)
class Choice:
    """Files of a data set with splits."""

    files: tuple[str, ...]
    evaluation: tuple[str, ...] = ()
    """Those of the validation split, when another one is read."""
    apart: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Splits that are left alone."""
    note: str = ""


def choose(path: str, layout: Layout | None, files: Sequence[str], wanted: Wanted) -> Choice | None:
    """The files to read; None when the folder has no splits and is read whole. Raises DataError for a choice that is not there."""
    if layout is None or wanted == EVERYTHING:
        return None
    layout = _with_implied_train(layout)
    roles = {role_of(each.split) for each in layout.filed} - {None}
    if not wanted.chosen and not layout.declared and roles <= {TRAIN}:
        return None
    filed = _of_subset(path, layout, wanted)
    if wanted.split == ALL:
        return Choice(tuple(each.path for each in filed))
    splits = by_split(filed)
    name = _split(path, splits, wanted)
    if name is None:
        if len(splits) == 1 and not layout.rest:
            only = next(iter(splits))
            told = "" if role_of(only) == TRAIN else f"{path}: {only} is the only split of it and is read"
            return Choice(tuple(splits[only]), note=told)
        told = ", ".join(f"{split} ({many(len(paths), 'file')})" for split, paths in splits.items())
        note = f"{path}: no split of it is {' or '.join(wanted.prefer)}, so all are read: {told}; --set data.split=NAME reads one"
        return Choice(tuple(files), note=note) if wanted.subset is None else Choice(tuple(each.path for each in filed), note=note)
    validation = None if role_of(name) == VALIDATION or wanted.prefer != (TRAIN,) else _one(splits, VALIDATION)
    apart = {split: paths for split, paths in splits.items() if split not in (name, validation)}
    evaluation = tuple(splits[validation]) if validation is not None else ()
    note = _note(path, layout, filed, name, validation, splits)
    return Choice(tuple(splits[name]), evaluation, tuple((split, tuple(paths)) for split, paths in apart.items()), note)


def _with_implied_train(layout: Layout) -> Layout:
    """Where files are called nothing but `test` or `dev`, those beside them that name no split are what is trained on."""
    if any(role_of(each.split) == TRAIN for each in layout.filed) or layout.declared or not layout.rest:
        return layout
    if not all(each.alone for each in layout.filed):
        return Layout(layout.by, (), layout.rest, declared=False)
    by = f"{layout.by} (what names none is train)"
    return Layout(by, (*(Filed(path, TRAIN) for path in layout.rest), *layout.filed))


def _of_subset(path: str, layout: Layout, wanted: Wanted) -> list[Filed]:
    """The files of the subset that is wanted, or of the one that there is."""
    subsets: dict[str, list[Filed]] = {}
    for each in layout.filed:
        subsets.setdefault(each.subset, []).append(each)
    if wanted.subset == ALL and ALL not in subsets:
        return list(layout.filed)
    if wanted.subset is not None:
        found = next((name for name in subsets if name.casefold() == wanted.subset.casefold()), None)
        if found is None:
            raise _unknown("subset", wanted.subset, [name for name in subsets if name], path)
        return subsets[found]
    able = [name for name, filed in subsets.items() if _split_or_none(by_split(filed), wanted) is not None] or list(subsets)
    usual = [name for name in (layout.default, "", "default") if name in able]
    if len(able) > 1 and not usual:
        if wanted.split == ALL:
            return list(layout.filed)
        names = ", ".join(able[:12]) + (f" and {len(able) - 12} more" if len(able) > 12 else "")
        message = f"there are {len(able)} subsets, and rows of one may differ from those of another: {names}"
        hint = f"--set data.subset={able[0]}   reads one, and all instead of its name every one"
        raise DataError(Problem(code="data.several-subsets", message=message, where=path, hint=hint))
    return subsets[usual[0] if usual else able[0]]


def _split(path: str, splits: Mapping[str, list[str]], wanted: Wanted) -> str | None:
    """The split to read; None when none is chosen and none is preferred."""
    found = _split_or_none(splits, wanted)
    if found is not None:
        return found
    if wanted.split is not None:
        raise _unknown("split", wanted.split, list(splits), path)
    for role in wanted.prefer:
        names = [name for name in splits if role_of(name) == role]
        if names:
            message = f"{len(names)} splits are called {role}: {', '.join(names)}"
            hint = f"--set data.split={names[0]}   reads one"
            raise DataError(Problem(code="data.several-splits", message=message, where=path, hint=hint))
    return None


def _split_or_none(splits: Mapping[str, list[str]], wanted: Wanted) -> str | None:
    if wanted.split is not None:
        asked = wanted.split.casefold()
        exact = next((name for name in splits if name.casefold() == asked), None)
        role = role_of(asked)
        return exact or (_one(splits, role) if role is not None and asked.isalpha() else None)
    return next((name for role in wanted.prefer if (name := _one(splits, role)) is not None), None)


def _one(splits: Mapping[str, list[str]], role: str) -> str | None:
    """The split for this: the one of this very name, or the only one whose name says so."""
    names = [name for name in splits if role_of(name) == role]
    return role if role in names else "eval" if "eval" in names else names[0] if len(names) == 1 else None


def _note(path: str, layout: Layout, filed: Sequence[Filed], name: str, validation: str | None, splits: Mapping[str, list[str]]) -> str:
    """What is read, evaluated on and left alone, in one line."""
    words = [f"{split} is {'read' if split == name else 'left alone'} ({_files(paths, path)})" for split, paths in splits.items()]
    if validation is not None:
        told = f"{validation} is there to evaluate on ({_files(splits[validation], path)})"
        words = [told if word.startswith(f"{validation} is left") else word for word in words]
    words.sort(key=lambda word: (not word.startswith(f"{name} is read"), " is left alone (" in word))
    subset = filed[0].subset if len({each.subset for each in filed}) == 1 else ""
    others = sorted({each.subset for each in layout.filed} - {each.subset for each in filed})
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        words.append(f"of the subsets {subset or 'the first folder'} is read, not {', '.join(others[:3])}{more} (data.subset)")
    if layout.rest:
        words.append(f"{many(len(layout.rest), 'file')} of no split not read")
    return f"{path}: splits by {layout.by}: {'; '.join(words)}" if len(words) > 1 else ""


def _files(paths: Sequence[str], folder: str) -> str:
    if len(paths) > 1:
        return f"{len(paths):,} files"
    return os.path.relpath(paths[0], folder) if Path(folder).is_dir() else Path(paths[0]).name


def _unknown(what: str, asked: str, there: Sequence[str], path: str) -> DataError:
    usual = [name for name in there if name == TRAIN]
    near = next(iter([*difflib.get_close_matches(asked, there, n=1), *usual, *there]), None)
    message = f"there is no {what} {asked}; there {'is' if len(there) == 1 else 'are'} {', '.join(there) or 'none'}"
    hint = f"--set data.{what}={near}" if near else f"--set data.{what}=null"
    code = "data.unknown-split" if what == "split" else "data.unknown-subset"
    return DataError(Problem(code=code, message=message, where=path, hint=hint))


def require_splits(wanted: Wanted, paths: Sequence[str]) -> None:
    """DataError when a split or subset was asked for, and these paths have none."""
    what, asked = ("split", wanted.split) if wanted.split is not None else ("subset", wanted.subset)
    if wanted.required and asked not in (None, ALL):
        raise _unknown(what, str(asked), [], ", ".join(paths))


def evaluation_paths(data: DataConfig, split: tuple[str, ...]) -> tuple[tuple[str, ...] | None, str]:
    """Where the rows to evaluate on are when `split` is the validation split, None when they are held out; and why it is not used."""
    if data.eval_path is not None:
        return (data.eval_path,), f"data.eval_path is {data.eval_path}, so the validation split is left alone" if split else ""
    if split and data.eval_split != "auto":
        return None, f"data.eval_split is {data.eval_split:g}, so the validation split is left alone"
    return split or None, ""
