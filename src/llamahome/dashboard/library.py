"""The runs that the dashboard shows, by id, and what was read of them, kept while it is true.

A request names a run by its id, which is looked up among the ids of the runs that are there; no path is ever made from a request.
"""

import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamahome.config.load import LoadedConfig, read_saved_config
from llamahome.dashboard.curves import Curves
from llamahome.errors import ConfigError
from llamahome.monitoring.runs import RunInfo, describe_run, run_paths
from llamahome.rundir import RUNS, RunPaths

_PLAIN_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
"""A run's own folder could hold an id such as ../../etc; runs with such ids are left out."""
_CURVES_KEPT = 8
"""Files; one of 200,000 records takes about 70 MB."""


@dataclass(frozen=True)
class RunFiles:
    """The files of one run that the dashboard reads."""

    paths: RunPaths
    metrics: Curves
    machine: Curves


class Library:
    """Finds runs and remembers what it has read. Threads may share it."""

    def __init__(self, root: Path = RUNS) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._infos: dict[str, tuple[object, RunInfo]] = {}
        self._curves: OrderedDict[str, RunFiles] = OrderedDict()
        self._configs: dict[str, tuple[int, LoadedConfig | str]] = {}

    def runs(self) -> dict[str, RunPaths]:
        """The runs that are there now, by id."""
        found = reversed(run_paths(self._root))  # so that of two folders with one id the first stays
        return {paths.run_id: paths for paths in found if _PLAIN_ID.fullmatch(paths.run_id)}

    def find(self, run_id: str) -> RunPaths | None:
        """The run with this id."""
        return self.runs().get(run_id)

    def infos(self) -> list[RunInfo]:
        """State and last metrics of every run, the newest first. A run that has ended is read again only if its files change."""
        found = [self.info(paths) for paths in self.runs().values()]
        return sorted(found, key=lambda run: (run.started, run.run_id), reverse=True)

    def info(self, paths: RunPaths) -> RunInfo:
        """State and last metrics of one run."""
        seen = tuple(_version(paths.metrics_dir / name) for name in ("metrics.jsonl", "status.json"))
        with self._lock:
            kept = self._infos.get(paths.run_id)
        if kept is not None and kept[0] == (paths.root, seen) and kept[1].state in ("finished", "stopped", "failed"):
            return kept[1]
        info = describe_run(paths)
        with self._lock:
            self._infos[paths.run_id] = ((paths.root, seen), info)
        return info

    def open(self, paths: RunPaths) -> RunFiles:
        """The curves of a run, as far as they have been read; `update` them before use."""
        with self._lock:
            files = self._curves.get(paths.run_id)
            if files is None or files.paths != paths:
                files = RunFiles(paths, Curves(paths.metrics_dir / "metrics.jsonl"), Curves(paths.metrics_dir / "system.jsonl"))
            self._curves[paths.run_id] = files
            self._curves.move_to_end(paths.run_id)
            while len(self._curves) > _CURVES_KEPT:
                self._curves.popitem(last=False)
            return files

    def config(self, paths: RunPaths) -> LoadedConfig | str:
        """The settings of a run, or why they cannot be read."""
        version = _version(paths.config)
        kept = self._configs.get(str(paths.root))
        if kept is not None and kept[0] == version:
            return kept[1]
        config: LoadedConfig | str
        try:
            config = read_saved_config(paths.config)
        except ConfigError as error:
            config = error.problems[0].message
        self._configs[str(paths.root)] = (version, config)
        return config


def _version(path: Path) -> int:
    """Changes when the file does; 0 if it is missing."""
    try:
        facts = path.stat()
    except OSError:
        return 0
    return hash((facts.st_mtime_ns, facts.st_size, facts.st_ino))


def changed_settings(config: LoadedConfig) -> dict[str, Any]:
    """Key and value of each setting that is not at its default."""
    from llamahome.config.describe import settings

    found = {key: (setting.of(config.config), setting.default) for key, setting in settings().items()}
    return {key: value for key, (value, default) in found.items() if value != default}
