"""Checkpoints on the disk: a checkpoint is whole or it is not there, and an older one is never at risk. together.py writes them.

Everything is written into `checkpoint-<step>.tmp`, flushed file by file, the manifest last; then one rename is the commit.
A kill, a full disk or a power cut at any moment leaves the earlier checkpoints and at most a `.tmp` folder, which the next
save removes. Only safetensors, JSON and YAML are written and read; nothing is unpickled.
Cost of a save: one write and one read (for the hashes) of model and optimizer; of a load: two reads.
"""

import contextlib
import json
import re
import shlex
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors
import safetensors.torch
import torch

from llamahome.checkpoint import manifest
from llamahome.checkpoint.manifest import Fingerprints
from llamahome.checkpoint.state import TrainerState, read_state
from llamahome.distributed.tensorfiles import Pieces
from llamahome.errors import CheckpointError, LlamaHomeError, Problem
from llamahome.rundir import RUNS, RunPaths, as_typed, first_command, free_beside
from llamahome.units import show_bytes

MODEL, STATE, CONFIG = "model", "trainer_state.json", "config.yaml"
TENSORS, VALUES = "optimizer", "optimizer/optimizer.json"
"""A folder of one or several files of whole tensors, by as many processes as wrote them."""
_OS_ERROR = re.compile(r"\(os error \d+\)")


class SaveFailed(CheckpointError):
    """The disk refused a checkpoint (full, over quota, read-only). Earlier ones are untouched; training may go on."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was verified and read."""

    folder: Path
    state: TrainerState
    config_path: Path
    """The run's resolved config.yaml as it was at that step."""
    model_dir: Path
    """A PEFT or Hugging Face folder."""
    optimizer_tensors: dict[str, torch.Tensor]
    """On the CPU."""
    optimizer_values: dict[str, Any]
    fingerprints: Fingerprints


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a folder beside `folder`, flush it and rename it there: as a checkpoint, `folder` is whole or as it was.

    Raises SaveFailed (checkpoint.write-failed).
    """
    fresh = folder.with_name(f"{folder.name}.tmp")
    with DiskBorder(fresh, what=f"{folder.name}/"):
        if fresh.exists():
            shutil.rmtree(fresh)
        fresh.mkdir(parents=True)
        fill(fresh)
        manifest.flush_files(fresh)
        commit(fresh, folder)


def space_needed(paths: RunPaths, optimizer_tensors: Mapping[str, torch.Tensor | Pieces]) -> int:
    """Bytes that the next checkpoint will take: as much as the newest one, or else estimated from the optimizer.

    AdamW keeps two numbers per trained weight and the weight itself is a third, so a half more than the optimizer; 8 MiB for
    the tokenizer and the small files.
    """
    estimate = 3 * sum(tensor.nbytes for tensor in optimizer_tensors.values()) // 2 + 8 * 2**20
    for _, folder in reversed(paths.checkpoints()):
        try:
            return manifest.read(folder).total_bytes + 2**20
        except CheckpointError:
            continue
    return estimate


def require_space(folder: Path, needed: int) -> None:
    """SaveFailed, with numbers, when the disk that holds `folder` has less than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        message = f"a checkpoint needs about {show_bytes(needed)} and {show_bytes(free)} are left"
        raise SaveFailed(Problem(code="checkpoint.write-failed", message=message, where=str(folder), hint=_space_hint(folder)))


def load(folder: Path) -> Saved:
    """Verify and read the checkpoint in `folder`.

    Raises CheckpointError that names every damaged file and, as the remedy, the newest older checkpoint that is whole.
    """
    problems = manifest.verify(folder)
    if problems:
        raise CheckpointError(manifest.with_last_hint(problems, _way_out(folder)))
    values = json.loads((folder / VALUES).read_text(encoding="utf-8"))
    return Saved(
        folder=folder,
        state=read_state(folder / STATE),
        config_path=folder / CONFIG,
        model_dir=folder / MODEL,
        optimizer_tensors=_read_tensors(folder / TENSORS),
        optimizer_values=values,
        fingerprints=manifest.read(folder).fingerprints,
    )


def choose(paths: RunPaths, *, warn: Callable[[Problem], None]) -> Path:
    """The newest checkpoint of a run that verifies; `warn` is told of each newer one that does not.

    Raises CheckpointError checkpoint.none when there is none at all.
    """
    found = paths.checkpoints()
    for _, folder in reversed(found):
        problems = manifest.verify(folder)
        if not problems:
            return folder
        for problem in problems:
            warn(replace(problem, message=f"{problem.message}; {folder.name} is passed over for an older one"))
    message = f"none of the run's {len(found)} checkpoints is whole" if found else "the run has no checkpoint yet"
    again = _start_again(paths.root, paths.config)
    raise CheckpointError(Problem(code="checkpoint.none", message=message, where=as_typed(paths.root), hint=again))


def compare_fingerprints(saved: Fingerprints, now: Fingerprints, *, allowed: Collection[str]) -> None:
    """CheckpointError when data or base model are not those of the checkpoint, unless `allowed` holds "data" or "base"."""
    meaning = {"data": ("checkpoint.data-changed", "the training data"), "base": ("checkpoint.base-changed", "the base model")}
    problems = [
        Problem(
            code=code,
            message=f"{what} changed since the checkpoint was written: {getattr(saved, name)[:12]} then, {getattr(now, name)[:12]} now",
            hint=f"--allow-changed {name}",
        )
        for name, (code, what) in meaning.items()
        if getattr(saved, name) != getattr(now, name) and name not in allowed
    ]
    if problems:
        raise CheckpointError(problems)


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files of `folder`."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in safetensors.torch.load_file(path).items()}


class DiskBorder:
    """Turns what the disk refuses into SaveFailed, and leaves no partial `fresh` folder whatever is raised.

    The libraries in Rust report a full disk as exceptions of their own, with "(os error 28)" in the text.
    """

    def __init__(self, fresh: Path, *, what: str = "the checkpoint") -> None:
        self.fresh = fresh
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            return
        if self.fresh.name.endswith(".tmp"):
            shutil.rmtree(self.fresh, ignore_errors=True)
        refused = isinstance(error, OSError | safetensors.SafetensorError) or _OS_ERROR.search(str(error))
        if refused and not isinstance(error, LlamaHomeError):
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise SaveFailed(
                Problem(
                    code="checkpoint.write-failed",
                    message=f"{self.what} could not be written: {reason}; earlier ones are untouched",
                    where=str(self.fresh.with_suffix("") if self.fresh.name.endswith(".tmp") else self.fresh),
                    hint=_space_hint(self.fresh.parent),
                )
            ) from error


def _space_hint(folder: Path) -> str:
    return f"free space on the disk of {folder}, or save less often: --set checkpoint.every='1 h' --set checkpoint.keep_last=1"


def holds(folder: Path, state: TrainerState) -> bool:
    """Whether the checkpoint of this very state stands there, whole; the clock may differ."""
    if not folder.is_dir() or manifest.verify(folder):
        return False
    try:
        return replace(read_state(folder / STATE), elapsed_s=0.0) == replace(state, elapsed_s=0.0)
    except CheckpointError:
        return False


def commit(fresh: Path, folder: Path) -> None:
    """One rename. A damaged or abandoned checkpoint of the same step is moved out of the way first, and removed afterwards."""
    aside = folder.with_name(f".trash-{folder.name}")
    if folder.exists():
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)
    try:
        fresh.rename(folder)
    except OSError:
        if aside.exists():
            aside.rename(folder)
        raise
    manifest.flush_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _way_out(folder: Path) -> str:
    step = re.search(r"(\d+)$", folder.name)
    root = folder.parent
    older = [(number, path) for number, path in RunPaths(root, root.name).checkpoints() if step is None or number < int(step[1])]
    for _, path in reversed(older):
        if not manifest.verify(path):
            return f"llamahome train-resume {as_typed(path)}"
    return _start_again(root, root / CONFIG)


def _start_again(root: Path, config: Path) -> str:
    """The command for a new run with the settings of the run in `root`, on its data where any of its checkpoints still tells which."""
    command = first_command()
    for _, folder in RunPaths(root, root.name).checkpoints():
        with contextlib.suppress(CheckpointError, KeyError):
            typed = read_state(folder / STATE).extra["data_path"]
            command = f"llamahome train {shlex.join([typed] if isinstance(typed, str) else typed)}"
    elsewhere = "" if root.resolve().parent == RUNS.resolve() else f" --output {free_beside(root)}"
    return f"{command} --config {as_typed(config)}{elsewhere}"
