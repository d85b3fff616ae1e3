"""Data sets of the Hugging Face hub: the `datasets` library fetches them into its own cache, whose Arrow files are then read.

An id is org/name, org/name:config or org/name:config:split (org/name::split); data.subset and data.split give what it leaves out. Without
a split, train is read and validation is used for evaluation, as in a folder with splits. Code of a data set is never run, because the
library cannot run any.
"""

import re
from pathlib import Path
from typing import Any

from llamahome.data.files.index import Notify
from llamahome.data.files.split_files import SplitFile, SplitLayout
from llamahome.data.files.splits import TO_TRAIN, Choice, Wanted, choose
from llamahome.errors import DataError, MachineError, Problem
from llamahome.progress_marks import NO_LIMIT, marks

_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<config>[\w.-]*))?(?::(?P<split>[\w.-]+))?", re.ASCII)
_FILE = re.compile(r".*\.(jsonl?|ndjson|csv|tsv|parquet|arrow|txt|md|gz|zst|xlsx|zip)", re.IGNORECASE)


def is_hub_id(path: str) -> bool:
    """Whether the path may be a data set of the hub: org/name if there is no folder `org`, and not the name of a file."""
    return bool(_ID.fullmatch(path)) and not _FILE.fullmatch(path) and not Path(path.split("/")[0]).exists()


def fetch(path: str, notify: Notify, wanted: Wanted = TO_TRAIN) -> Choice:
    """The Arrow files of the data set, downloaded if they are not yet; raises MachineError, or DataError if there is none."""
    try:
        import datasets
    except ImportError as error:
        message = "there is no such file or folder, and data sets of the hub are read with the library `datasets`, which is not installed"
        hint = "pip install 'llamahome[hub]'"
        raise MachineError(Problem(code="machine.extra-missing", message=message, where=path, hint=hint)) from error
    match = _ID.fullmatch(path)
    assert match is not None, "fetch is called only if is_hub_id"
    name, config, split = match["name"], match["config"] or wanted.subset, match["split"] or wanted.split
    notify(f"{path}: fetching the split {split or wanted.prefer[0]} from the hub")
    datasets.disable_progress_bars()
    try:
        with marks.allowing(NO_LIMIT):
            loaded = datasets.load_dataset(name, config, split=split)
    except FileNotFoundError as error:
        message = f"no such file or folder, and no such data set on the hub: {_one_line(error)}"
        raise DataError(Problem(code="data.not-found", message=message, where=path)) from error
    except OSError as error:
        message = f"the hub cannot be reached: {_one_line(error)}"
        hint = "give a file instead, or try again; with HF_HUB_OFFLINE=1 what was fetched before is used without a network"
        raise MachineError(Problem(code="machine.hub-unreachable", message=message, where=path, hint=hint)) from error
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        hint = f"{name}:CONFIG:SPLIT names another configuration or split"
        raise DataError(Problem(code="data.hub-refused", message=_one_line(error), where=path, hint=hint)) from error
    if split is not None:
        return Choice(_files(loaded))
    split_files = tuple(SplitFile(file, each) for each, part in loaded.items() for file in _files(part))
    paths = tuple(file.path for file in split_files)
    return choose(path, SplitLayout("the hub", split_files), paths, Wanted(prefer=wanted.prefer)) or Choice(paths)


def _files(loaded: Any) -> tuple[str, ...]:
    return tuple(str(file["filename"]) for file in loaded.cache_files)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
