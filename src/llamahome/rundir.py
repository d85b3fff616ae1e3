"""Every path that a run reads or writes, and the functions that make its folders.

A run never overwrites another: `create_run` refuses a folder that holds one. Layout: docs/files.md.
"""

import itertools
import os
import random
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from llamahome import durable
from llamahome.errors import ConfigError, MachineError, Problem

BASE_MODELS = Path("data/models/base")
STARTER = "smollm2-135m-instruct"
"""The base model that is fetched as a package, where none is named."""
QUANTIZED_MODELS = Path("data/models/quantized")
RAW_DATA = Path("data/training/raw")
PROCESSED_DATA = Path("data/training/processed")
UPLOADS = Path("data/training/uploads")
RUNS = Path("output/runs")
NEWEST = Path("output/training")
SWEEP_FILE, TRIALS = "command.json", "trials"
"""What makes a folder that of a sweep, and the folder in it that holds the runs: docs/Sweep.md."""
METRICS = Path("data/metrics/logs")
STARTED = Path("data/metrics/started")
DRAFTS = Path("data/metrics/drafts")
"""What the dashboard knows of the trainings that it started, and what they printed."""
_TENSORBOARD = Path("data/metrics/tensorboard")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_RUN_ID = "run_id"

_FIRST = "amber brave brisk calm clear early fond glad green keen light lively mellow merry noble quick quiet sunny swift warm"
_SECOND = "badger birch brook crane falcon fern finch harbor heron larch lark maple meadow otter pine raven river robin spruce willow"


@dataclass(frozen=True)
class RunPaths:
    """The folders of one run. `root` is output/runs/<run-id> or the folder of --output."""

    root: Path
    run_id: str

    @property
    def config(self) -> Path:
        """Resolved configuration, with the origin of each value as a comment."""
        return self.root / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, machine and command line."""
        return self.root / "environment.json"

    @property
    def report(self) -> Path:
        """The run as one page with charts."""
        return self.root / "report.html"

    @property
    def profile(self) -> Path:
        """Traces and tables of the steps that monitoring.profile names; missing without it."""
        return self.root / "profile"

    @property
    def lineage(self) -> Path:
        """The adapters that the run began with, the nearest first; missing if it began with none."""
        return self.root / "lineage.json"

    @property
    def final(self) -> Path:
        """The trained model: a PEFT or Hugging Face folder."""
        return self.root / "final"

    @property
    def project(self) -> Path:
        """The folder in which the run was trained: the nearest around it that holds its metrics, or else the working folder."""
        try:
            here, folders = Path.cwd(), self.root.resolve().parents
        except FileNotFoundError:  # the working folder has been removed
            return Path()
        around = next((folder for folder in folders if (folder / METRICS / self.run_id).is_dir()), here)
        return Path() if around == here else around

    @property
    def metrics_dir(self) -> Path:
        """Folder of metrics.jsonl, events.jsonl, system.jsonl, samples.jsonl and status.json."""
        return self.project / METRICS / self.run_id

    @property
    def tensorboard_dir(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.project / _TENSORBOARD / self.run_id

    def write_id(self) -> None:
        """Record the id in the run's folder."""
        durable.write_whole(self.root / _RUN_ID, self.run_id + "\n")

    def rank_log(self, rank: int) -> Path:
        """Log file of one process."""
        return self.root / "logs" / f"rank-{rank}.log"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after `step` updates."""
        return self.root / f"checkpoint-{step}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Committed checkpoints as (step, folder), oldest first. A `.tmp` folder is not one."""
        if not self.root.is_dir():
            return []
        matches = ((_CHECKPOINT.fullmatch(path.name), path) for path in self.root.iterdir() if path.is_dir())
        return sorted((int(match[1]), path) for match, path in matches if match)


def new_run_id(name: str | None, *, now: datetime | None = None) -> str:
    """`20261122-071405-brisk-otter`: date, time, and `name` or two words."""
    stamp = (now or datetime.now()).strftime("%Y%m%d-%H%M%S")
    words = random.SystemRandom()
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") if name else ""
    return f"{stamp}-{slug or words.choice(_FIRST.split()) + '-' + words.choice(_SECOND.split())}"


def create_run(output: Path | None, name: str | None) -> RunPaths:
    """Make the folder of a new run and point output/training to it.

    Raises ConfigError when `output` already holds a run, MachineError when it cannot be written.
    """
    run_id = new_run_id(name)
    root = output if output is not None else RUNS / run_id
    if output is not None:
        refuse_used(output)
        run_id = new_run_id(name or output.name)
    try:
        if output is None:
            root.parent.mkdir(parents=True, exist_ok=True)
            root, run_id = _claim(root)
        root.mkdir(parents=True, exist_ok=True)
        (root / _RUN_ID).write_text(run_id + "\n", encoding="utf-8")
    except OSError as error:
        raise MachineError(_unwritable(root, "the run's folder", str(error.strerror))) from error
    return RunPaths(root, run_id)


def _claim(root: Path) -> tuple[Path, str]:
    """Make `root`, or `root`-2, -3, ... if two runs with one name start in the same second; mkdir decides which run gets which."""
    for number in itertools.count(1):
        free = root if number == 1 else root.with_name(f"{root.name}-{number}")
        try:
            free.mkdir()
        except FileExistsError:
            continue
        return free, free.name
    raise AssertionError("unreachable: itertools.count never ends")


def rename_run(paths: RunPaths) -> RunPaths:
    """The same folder under a free id of its name, and an empty folder for its metrics; the id is not yet written."""
    fresh = new_run_id(paths.root.name)
    for number in itertools.count(1):
        own = RunPaths(paths.root, fresh if number == 1 else f"{fresh}-{number}")
        if not own.metrics_dir.exists() and not own.tensorboard_dir.exists():
            return own
    raise AssertionError("unreachable: itertools.count never ends")


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Raise MachineError instead of an OSError while a file of the run's folder `root` is written."""
    try:
        yield
    except OSError as error:
        raise MachineError(_unwritable(root, "the run's folder", error.strerror or str(error))) from error


def refuse_unwritable(output: Path | None, *, what: str = "the run's folder") -> None:
    """Raise MachineError if the folder of a new run cannot be made at `output`, or under output/runs; called before the long work."""
    folder = output if output is not None else RUNS
    existing = next((each for each in (folder, *folder.absolute().parents) if each.exists()), Path("/"))
    if existing.is_dir() and not os.access(existing, os.W_OK | os.X_OK):
        raise MachineError(_unwritable(folder, what, "no right to write there, or the disk is read-only"))
    if not existing.is_dir():
        raise MachineError(_unwritable(folder, what, f"{existing} is a file"))


def _unwritable(root: Path, what: str, why: str) -> Problem:
    return Problem(
        code="machine.output-not-writable",
        message=f"cannot write {what}: {why}",
        where=str(root),
        hint=f"--output {shlex.quote(str(Path.home() / root.name))}, or another folder that you may write to",
    )


def refuse_used(output: Path) -> None:
    """Raise ConfigError if `output` holds a run or anything else already."""
    if output.exists() and not output.is_dir():
        problem = Problem(
            code="output.not-a-folder", message="the output is a file", where=str(output), hint=f"--output {free_beside(output)}"
        )
        raise ConfigError(problem)
    if output.is_dir() and any(output.iterdir()):
        holds_run = (output / "config.yaml").exists()
        raise ConfigError(
            Problem(
                code="output.holds-a-run" if holds_run else "output.not-empty",
                message="the output folder already holds a run" if holds_run else "the output folder is not empty",
                where=str(output),
                hint=f"llamahome train-resume {as_typed(output)}" if holds_run else f"--output {free_beside(output)}",
            )
        )


def free_beside(used: Path) -> str:
    """The first of used-2, used-3, ... that does not exist, as one types it."""
    name = used.stem if used.is_file() else used.resolve().name
    free = (used.with_name(f"{name}-{number}") if used.name else Path(f"{name}-{number}") for number in itertools.count(2))
    return next(as_typed(path) for path in free if not path.exists())


def first_command() -> str:
    """The command to type before there is any run: train on the raw data, after writing the sample data if there is none."""
    any_rows = any(path.is_file() and not path.name.startswith(".") for path in RAW_DATA.rglob("*"))
    return f"llamahome train {RAW_DATA}" if any_rows else f"llamahome data sample {RAW_DATA} && llamahome train {RAW_DATA}"


def point_newest_to(root: Path) -> None:
    """Make output/training a link to `root`, replacing an older link with one rename; a real folder there stays. Not for a trial."""
    if sweep_of(root) is not None or (NEWEST.exists() and not NEWEST.is_symlink()):
        return
    NEWEST.parent.mkdir(parents=True, exist_ok=True)
    fresh = NEWEST.with_name(f".training-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(root.resolve(), NEWEST.parent.resolve()))
    fresh.replace(NEWEST)


def sweep_of(run: Path) -> Path | None:
    """The folder of the sweep that the run in the folder `run` is a trial of, or None."""
    trials = run.resolve().parent
    return trials.parent if trials.name == TRIALS and (trials.parent / SWEEP_FILE).is_file() else None


def open_run(folder: Path) -> RunPaths:
    """The paths of an existing run; its id is in the file `run_id`, because the folder of `--output` may have another name.

    An id is the name of a folder in data/metrics; what cannot be one, as in a file that a power cut left empty, is not taken for it.
    """
    root = folder.resolve()
    try:
        run_id = (root / _RUN_ID).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        run_id = ""
    return RunPaths(root, run_id if run_id.strip(".") and run_id.isprintable() and not re.search(r"[/\\]", run_id) else root.name)


def run_of(folder: Path) -> Path | None:
    """The folder of the run that `folder` is, or whose final model or checkpoint it is; None for a folder of another origin."""
    full = folder.resolve()
    return next((each for each in (full, *list(full.parents)[:2]) if (each / _RUN_ID).is_file()), None)


def as_typed(path: Path) -> str:
    """`path` as one would type it here, quoted for a shell if needed, with links followed, because a link may name another run later."""
    return shlex.quote(not_an_option(str(nearby(path))))


def not_an_option(path: str) -> str:
    """The same path in a form that no command takes for an option: `./-rows.jsonl` for `-rows.jsonl`."""
    return f"./{path}" if path.startswith("-") and path != "-" else path


def nearby(path: Path) -> Path:
    """`path` relative to the working folder if it is below it, otherwise absolute; links are followed."""
    full, here = path.resolve(), Path.cwd()
    return full.relative_to(here) if full.is_relative_to(here) else full
