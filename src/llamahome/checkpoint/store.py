"""Checkpoints on the disk: a checkpoint is complete or does not exist, and older ones are never at risk. collective_save.py writes them.

Everything is written to `checkpoint-<step>.tmp` and flushed file by file, the manifest last; then one rename commits the checkpoint.
A kill, a full disk or a power cut at any moment leaves the earlier checkpoints intact and at most a `.tmp` folder, which the next save
removes. Only safetensors, JSON and YAML are written and read; nothing is unpickled.
Cost of a save: one write and one read (for the hashes) of model and optimizer; of a load: two reads.
"""

import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors
import safetensors.torch
import torch

from llamahome import durable
from llamahome.checkpoint import manifest
from llamahome.checkpoint.manifest import Fingerprints
from llamahome.checkpoint.state import STATE, TrainerState, read_state
from llamahome.checkpoint.target import resume_older, start_again
from llamahome.distributed.devices import is_out_of_memory
from llamahome.distributed.tensorfiles import TensorSlices
from llamahome.errors import CheckpointError, LlamaHomeError, Problem
from llamahome.rundir import RunPaths, as_typed
from llamahome.units import show_bytes

MODEL, CONFIG = "model", "config.yaml"
TENSORS, VALUES = "optimizer", "optimizer/optimizer.json"
"""TENSORS is a folder with one or several files of whole tensors."""
_OS_ERROR = re.compile(r"\(os error \d+\)")
_MEMORY_HINT = "end other programs on this machine, or copy less: --set checkpoint.async=false"


class SaveFailed(CheckpointError):
    """A checkpoint could not be written (disk full, over quota, read-only). Earlier ones are intact; training may go on."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was verified and read."""

    folder: Path
    state: TrainerState
    config_path: Path
    """The resolved config.yaml of the run at that step."""
    model_dir: Path
    """A PEFT or Hugging Face folder."""
    optimizer_tensors: dict[str, torch.Tensor]
    """On the CPU."""
    optimizer_values: dict[str, Any]
    fingerprints: Fingerprints


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Replace `folder` atomically: `fill` writes into a temporary folder, which is flushed and renamed.

    Raises SaveFailed (checkpoint.write-failed); then `folder` is unchanged.
    """
    partial = folder.with_name(f"{folder.name}.tmp")
    with WriteGuard(partial, what=f"{folder.name}/"):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        fill(partial)
        durable.flush_tree(partial)
        durable.replace_folder(partial, folder)


def space_needed(paths: RunPaths, optimizer_tensors: Mapping[str, torch.Tensor | TensorSlices]) -> int:
    """Bytes that the next checkpoint needs: as many as the newest one, or else an estimate from the optimizer.

    AdamW keeps two values per trained weight and the weight itself is a third, so 1.5 times the optimizer; plus 8 MiB for the tokenizer and
    the small files.
    """
    estimate = 3 * sum(tensor.nbytes for tensor in optimizer_tensors.values()) // 2 + 8 * 2**20
    for _, folder in reversed(paths.checkpoints()):
        try:
            return manifest.read(folder).total_bytes + 2**20
        except CheckpointError:
            continue
    return estimate


def require_space(folder: Path, needed: int, *, what: str = "a checkpoint") -> None:
    """Raise SaveFailed if the disk of `folder` has less than the `needed` bytes of `what` free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        message = f"{what} needs about {show_bytes(needed)} and {show_bytes(free)} are free"
        raise SaveFailed(Problem(code="checkpoint.write-failed", message=message, where=str(folder), hint=_space_hint(folder)))


def load(folder: Path, *, verified: bool = False) -> Saved:
    """Verify the checkpoint in `folder`, unless it was `verified` just now, and read it.

    Raises CheckpointError, which names every damaged file; its hint is the newest older checkpoint that is intact.
    """
    problems = [] if verified else manifest.verify(folder)
    if problems:
        raise CheckpointError([*problems[:-1], replace(problems[-1], hint=resume_older(folder))])
    try:
        tensors = read_tensors(folder / TENSORS)
        values = json.loads((folder / VALUES).read_text(encoding="utf-8"))
    except (OSError, ValueError, safetensors.SafetensorError) as error:  # a manifest that fits, of files that are none of ours
        message = f"the optimizer's state cannot be read: {error}"
        problem = Problem(code="checkpoint.damaged", message=message, where=str(folder / TENSORS), hint=resume_older(folder))
        raise CheckpointError(problem) from error
    return Saved(
        folder=folder,
        state=read_state(folder / STATE),
        config_path=folder / CONFIG,
        model_dir=folder / MODEL,
        optimizer_tensors=tensors,
        optimizer_values=values,
        fingerprints=manifest.read(folder).fingerprints,
    )


def choose(paths: RunPaths, *, warn: Callable[[Problem], None]) -> Path:
    """The newest intact checkpoint of a run; `warn` gets the problems of newer ones that are damaged.

    Raises CheckpointError checkpoint.none if no checkpoint is intact.
    """
    checkpoints = paths.checkpoints()
    for _, folder in reversed(checkpoints):
        problems = manifest.verify(folder)
        if not problems:
            return folder
        for problem in problems:
            warn(replace(problem, message=f"{problem.message}; an older checkpoint is used instead of {folder.name}"))
    message = f"none of the run's {len(checkpoints)} checkpoints is intact" if checkpoints else "the run has no checkpoint yet"
    hint = start_again(paths.root, paths.config)
    raise CheckpointError(Problem(code="checkpoint.none", message=message, where=as_typed(paths.root), hint=hint))


def compare_fingerprints(saved: Fingerprints, now: Fingerprints, *, allowed: Collection[str], by_settings: str = "") -> None:
    """Raise CheckpointError if data or base model differ from those of the checkpoint, unless `allowed` contains "data" or "base".

    `by_settings` are the changed settings of data, if there are any: they change the fingerprint as other files do.
    """
    names = {"data": ("checkpoint.data-changed", "the training data"), "base": ("checkpoint.base-changed", "the base model")}
    problems = [
        Problem(
            code=code,
            message=f"{what} changed since the checkpoint was written: {getattr(saved, name)[:12]} then, {getattr(now, name)[:12]} now"
            + (f"; what changed with it: {by_settings}" if name == "data" and by_settings else ""),
            hint=f"--allow-changed {name}",
        )
        for name, (code, what) in names.items()
        if getattr(saved, name) != getattr(now, name) and name not in allowed
    ]
    if problems:
        raise CheckpointError(problems)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files of `folder`."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in safetensors.torch.load_file(path).items()}


class WriteGuard:
    """A context that turns errors of the disk, and memory that ran out, into SaveFailed and removes the partial folder after any error.

    Libraries written in Rust report a full disk as exceptions of their own, with "(os error 28)" in the text.
    """

    def __init__(self, partial: Path, *, what: str = "the checkpoint") -> None:
        self.partial = partial
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            return
        if self.partial.name.endswith(".tmp"):
            shutil.rmtree(self.partial, ignore_errors=True)
        full = isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error)
        is_disk_error = isinstance(error, OSError | safetensors.SafetensorError) or _OS_ERROR.search(str(error))
        if (is_disk_error or full) and not isinstance(error, LlamaHomeError):
            cause = (str(error).splitlines() or ["no more memory"])[0][:160]
            reason = "memory ran out: " + cause if full else error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise SaveFailed(
                Problem(
                    code="checkpoint.write-failed",
                    message=f"{self.what} could not be written: {reason}; earlier ones are untouched",
                    where=str(self.partial.with_suffix("") if self.partial.name.endswith(".tmp") else self.partial),
                    hint=_MEMORY_HINT if full else _space_hint(self.partial.parent),
                )
            ) from error


def _space_hint(folder: Path) -> str:
    return f"free space on the disk of {folder}, or save less often: --set checkpoint.every='1 h' --set checkpoint.keep_last=1"


def contains(folder: Path, state: TrainerState) -> bool:
    """Whether `folder` is an intact checkpoint of this state; elapsed time may differ."""
    if not folder.is_dir() or manifest.verify(folder):
        return False
    try:
        return replace(read_state(folder / STATE), elapsed_s=0.0) == replace(state, elapsed_s=0.0)
    except CheckpointError:
        return False


def branch(folder: Path, step: int, paths: RunPaths) -> Path:
    """Put the checkpoint `folder` of `step` into the run of `paths`, as its start; files become hard links if the disk supports them.

    Retention leaves it alone, because its manifest names the run that it came from. Called by one process; raises SaveFailed.
    """
    target = paths.checkpoint(step)
    partial = target.with_name(f"{target.name}.tmp")
    with WriteGuard(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path in sorted(folder.rglob("*")):  # sorted, so that a folder comes before its content
            copy = partial / path.relative_to(folder)
            if path.is_dir():
                copy.mkdir()
            else:
                durable.link(path, copy)
        durable.flush_tree(partial)
        durable.replace_folder(partial, target)
    return target
