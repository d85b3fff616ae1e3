"""What a run leaves on the disk: checkpoints, written by all processes at once, and the final model as one plain folder."""

import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llamahome.assembly import Job, Learner, Session
from llamahome.checkpoint import retention, store
from llamahome.checkpoint.background import Snapshot, writer_thread
from llamahome.checkpoint.manifest import Fingerprints
from llamahome.checkpoint.state import TrainerState
from llamahome.checkpoint.together import save_together
from llamahome.config.load import dump_config
from llamahome.data.text.ends import learned_ends
from llamahome.distributed.tensorfiles import TAKES_PART, WRITES_ALL, Part, Pieces, write_files
from llamahome.distributed.world import World
from llamahome.errors import Problem
from llamahome.model.adapter import changing, save_in_parts, save_model
from llamahome.model.ends import name_ends, name_eos
from llamahome.monitoring.recorder import Recorder
from llamahome.monitoring.resources import free_memory_bytes
from llamahome.rundir import RunPaths
from llamahome.training.optimizer import optimizer_tensors
from llamahome.training.saves import Tell
from llamahome.units import show_bytes

_ROOM = 4
"""How often the copy that is written beside the training has to fit into the free memory: evaluation and longer rows need some, too."""


def write_model(
    job: Job, learner: Learner, folder: Path, part: Part = WRITES_ALL, *, taken: Mapping[str, Tensor] | None = None
) -> list[Path]:
    """Fill `folder` with what was trained and the chat template that it was trained with.

    `taken` are copies of the weights, written in their place. Where weights are sharded all processes call it. Returns the files of weights
    that this process wrote, if several did.
    """
    files: list[Path] = []
    if learner.placement.cut or (part.count > 1 and learner.saved is learner.model):
        weights = {name: learner.placement.pieces(name, each.detach()) for name, each in learner.parameters.items()}
        files = save_in_parts(learner.model, folder, base=learner.base, weights=weights, part=part)
    elif part.number == 0:
        save_model(learner.saved, folder, base=learner.base, weights=taken)
    if part.number == 0:
        _write_ways(job, learner, folder)
    return files


def _write_ways(job: Job, learner: Learner, folder: Path) -> None:
    """The chat template with which the rows were written, and the tokens that were learned as ends."""
    model, tokenizer, report = job.loaded.config.model, job.tokenizer, job.prepared.report
    if model.chat_template is not None:
        shutil.copyfile(model.chat_template, folder / "chat_template.jinja")
    if report.system_merged or (model.system_role == "merge" and report.format != "text"):
        (folder / "chat_template.jinja").write_text(tokenizer.template.text, encoding="utf-8")
    if model.eos_token is not None:
        name_eos(folder, model.eos_token)
    name_ends(folder, learner.base, learned_ends(tokenizer, chats=report.format != "text"))


def write_final(job: Job, learner: Learner, paths: RunPaths, world: World) -> None:
    """Write the trained model as one plain folder; all processes call it."""

    def fill(folder: Path) -> None:
        write_model(job, learner, folder)

    if world.is_main:
        store.write_folder(paths.final, fill)
    elif learner.placement.cut:
        write_model(job, learner, paths.final, TAKES_PART)


def require_space(paths: RunPaths, learner: Learner, world: World) -> None:
    """SaveFailed when the disk has no room for a checkpoint; asked before the first step, when nothing is lost yet."""
    if world.is_main:
        store.require_space(paths.root, store.space_needed(paths, _moments(learner)))


def _moments(learner: Learner) -> dict[str, Tensor | Pieces]:
    """As large as what the optimizer keeps, also before its first step."""
    pieces, names = learner.placement.pieces, ("exp_avg", "exp_avg_sq")
    return {f"{name}.{moment}": pieces(name, each.detach()) for name, each in learner.parameters.items() for moment in names}


def save_checkpoint(state: TrainerState, session: Session, job: Job, learner: Learner, paths: RunPaths, recorder: Recorder) -> Path:
    """All processes commit a checkpoint together; process 0 retires old ones."""
    return _commit(state, session, job, learner, paths, recorder, _Content(_optimizer_tensors(learner)))()


class Beside:
    """Saves of one process in a thread of their own, from copies of what training changes."""

    def __init__(self, session: Session, job: Job, learner: Learner, paths: RunPaths, recorder: Recorder) -> None:
        self._parts = (session, job, learner, paths, recorder)
        self._copies = Snapshot(), Snapshot()
        learner.optimizer.register_step_pre_hook(lambda *_: self._hold_updates_back())
        self._thread = writer_thread()
        self._why_not: str | None = "" if job.loaded.config.checkpoint.async_ else "checkpoint.async is false"

    def save(self, state: TrainerState) -> Future[Tell] | None:
        """Copy, begin to write, return at once; the save before must be done. None where the loop has to wait, which is told once."""
        _, _, learner, _, recorder = self._parts
        if self._why_not == "":
            self._why_not = _why_not_beside(self._parts[0].world, learner)
            if self._why_not is not None:
                recorder.event("saves-in-the-loop", step=state.step, why=self._why_not)
        if self._why_not is not None:
            return None
        weights, moments = self._copies
        content = _Content(moments.take(_optimizer_tensors(learner)), weights.take(changing(learner.saved)))
        return self._thread.submit(self._write, state, content)

    def _write(self, state: TrainerState, content: "_Content") -> Tell:
        for copy in self._copies:
            copy.wait()
        return _commit(state, *self._parts, content)

    def _hold_updates_back(self) -> None:
        for copy in self._copies:
            copy.hold_back()

    def close(self) -> None:
        """End the thread; a save that is under way is waited for."""
        self._thread.shutdown()


def _why_not_beside(world: World, learner: Learner) -> str | None:
    if world.size > 1:
        return f"{world.size} processes save together"
    needed = sum(tensor.nbytes for tensor in changing(learner.saved).values()) + sum(each.nbytes for each in _moments(learner).values())
    free = free_memory_bytes()
    if needed * _ROOM <= free:
        return None
    return f"a copy of what is saved takes {show_bytes(needed)}, and {show_bytes(free)} of memory are free"


@dataclass(frozen=True)
class _Content:
    """What a checkpoint is written from."""

    moments: dict[str, Tensor]
    weights: dict[str, Tensor] | None = None
    """None: what the model holds."""


def _optimizer_tensors(learner: Learner) -> dict[str, Tensor]:
    return optimizer_tensors(learner.optimizer, learner.parameters)


def _commit(
    state: TrainerState, session: Session, job: Job, learner: Learner, paths: RunPaths, recorder: Recorder, content: _Content
) -> Tell:
    """Commit a checkpoint and retire old ones, in whatever thread; what is returned tells of it, in the thread of the loop."""
    world, checkpoint = session.world, job.loaded.config.checkpoint
    whole = {name: learner.placement.pieces(name.rpartition(".")[0], each) for name, each in content.moments.items()}
    folder = save_together(
        world,
        paths,
        state=state,
        config_text=dump_config(job.loaded),
        fingerprints=Fingerprints(job.prepared.fingerprint, learner.base_fingerprint),
        writes={
            store.MODEL: lambda folder, part: write_model(job, learner, folder, part, taken=content.weights),
            store.TENSORS: lambda folder, part: write_files(folder, "optimizer", whole, part=part).mine,
        },
        optimizer_values={"kind": job.loaded.config.training.optimizer},
        needed=store.space_needed(paths, whole),
    )
    problems: list[Problem] = []
    if world.is_main:
        retention.apply(paths, keep_last=checkpoint.keep_last, keep_best=checkpoint.keep_best, warn=problems.append)

    def tell() -> Path:
        if world.is_main:
            recorder.event("saved", step=state.step, folder=folder.name)
        for problem in problems:
            session.progress.warn(f"{problem.where}: {problem.message}", "the run goes on")
        return folder

    return tell
