"""Data sets of the Hugging Face hub: fetched by the `datasets` library into its own cache, then read from there like other Arrow files.

An id is org/name, and org/name:config or org/name:config:split (org/name::split) where there are several; what it leaves out are the
settings data.subset and data.split. Without a split it is train, and validation is there to evaluate on, as in a folder with splits.
Code of a data set is never run: the library has no way to.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamahome.data.files.layout import Filed, Layout
from llamahome.data.files.splits import TO_TRAIN, Choice, Wanted, choose
from llamahome.errors import DataError, MachineError, Problem

_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<config>[\w.-]*))?(?::(?P<split>[\w.-]+))?", re.ASCII)
_FILE = re.compile(r".*\.(jsonl?|ndjson|csv|tsv|parquet|arrow|txt|md|gz|zst|xlsx|zip)", re.IGNORECASE)


def is_hub_id(path: str) -> bool:
    """Whether the words may name a data set: org/name where there is no folder `org`, and not the name of a file."""
    return bool(_ID.fullmatch(path)) and not _FILE.fullmatch(path) and not Path(path.split("/")[0]).exists()


def fetch(path: str, tell: Callable[[str], None], wanted: Wanted = TO_TRAIN) -> Choice:
    """The Arrow files of the data set, downloaded when they are not yet; raises MachineError, or DataError when there is none."""
    try:
        import datasets
    except ImportError as error:
        message = "there is no such file or folder, and data sets of the hub are read with the library `datasets`, which is not installed"
        hint = "pip install 'llamahome[hub]'"
        raise MachineError(Problem(code="machine.extra-missing", message=message, where=path, hint=hint)) from error
    match = _ID.fullmatch(path)
    assert match is not None, "asked only for what is_hub_id"
    name, config, split = match["name"], match["config"] or wanted.subset, match["split"] or wanted.split
    tell(f"{path}: fetching the split {split or wanted.prefer[0]} from the hub")
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except FileNotFoundError as error:
        raise DataError(
            _problem("data.not-found", path, f"no such file or folder, and no such data set on the hub: {_first(error)}")
        ) from error
    except OSError as error:
        message = f"the hub cannot be reached: {_first(error)}"
        hint = "give a file instead, or try again; what was fetched before is used without a network when HF_HUB_OFFLINE=1 is set"
        raise MachineError(Problem(code="machine.hub-unreachable", message=message, where=path, hint=hint)) from error
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        hint = f"{name}:CONFIG:SPLIT names another configuration or split"
        raise DataError(_problem("data.hub-refused", path, _first(error), hint)) from error
    if split is not None:
        return Choice(_files(loaded))
    filed = tuple(Filed(file, each) for each, part in loaded.items() for file in _files(part))
    everything = tuple(each.path for each in filed)
    return choose(path, Layout("the hub", filed), everything, Wanted(prefer=wanted.prefer)) or Choice(everything)


def _files(loaded: Any) -> tuple[str, ...]:
    return tuple(str(file["filename"]) for file in loaded.cache_files)


def _first(error: Exception) -> str:
    """What the library says, in one line."""
    return " ".join(str(error).split())[:300].rstrip(".")


def _problem(code: str, path: str, message: str, hint: str | None = None) -> Problem:
    return Problem(code=code, message=message, where=path, hint=hint)
