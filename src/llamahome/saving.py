"""What a run writes of its model: checkpoints, written by all ranks at once, and the final model as one plain folder."""

import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path

from torch import Tensor

from llamahome.assembly import Job
from llamahome.checkpoint import retention, store
from llamahome.checkpoint.background import Snapshot, writer_thread
from llamahome.checkpoint.collective_save import Write, save_together
from llamahome.checkpoint.manifest import Fingerprints
from llamahome.checkpoint.state import TrainerState
from llamahome.config.load import dump_config
from llamahome.config.schema import interval
from llamahome.data.steps.loader import Steps
from llamahome.data.text.end_tokens import learned_ends
from llamahome.data.text.new_tokens import write_new_tokens
from llamahome.distributed.tensorfiles import LARGEST_FILE, TAKES_PART, WRITES_ALL, TensorSlices, WriterShare, write_files
from llamahome.distributed.world import World
from llamahome.errors import Problem
from llamahome.model.adapter import changing, save_in_parts, save_model, saved_buffers
from llamahome.model.end_tokens import name_ends, name_eos
from llamahome.model.lora_init import starts_of
from llamahome.model.lora_vera import projections_of
from llamahome.monitoring.recorder import Recorder
from llamahome.monitoring.resources import free_memory_bytes
from llamahome.monitoring.throughput import PartClock
from llamahome.rundir import RunPaths
from llamahome.training.checkpointing import ReportSave
from llamahome.training.learner import Learner
from llamahome.training.optimizer import optimizer_tensors
from llamahome.units import parse_interval, show_bytes

_COPIES_THAT_FIT = 4
"""How many copies of what is saved must fit into the free memory before one is made: evaluation and longer rows need memory, too."""
_SLOWEST_S = 3600.0
"""How long ranks wait for each other in a save, as the watchdog does; one that died is noticed at once."""


def write_model(
    job: Job, folder: Path, share: WriterShare = WRITES_ALL, *, weights: Mapping[str, Tensor] | None = None, world: World | None = None
) -> list[Path]:
    """Fill `folder` with the trained weights, the chat template and the end tokens.

    `weights` are copies of what `trained_here` returns, which are written instead of the model's own. All ranks call it when weights are
    sharded; they send their rows through the group of `world`. Returns the weight files that this rank wrote if several ranks write.
    """
    files: list[Path] = []
    learner = job.learner
    placement = learner.placement
    if placement.cut or (share.count > 1 and learner.saved is learner.model):
        own = trained_here(learner) if weights is None else weights
        pieces = {name: placement.pieces(name, each, world or job.session.world) for name, each in own.items()}
        files = save_in_parts(learner.model, folder, base=learner.auxiliary, weights=pieces, part=share)
    elif share.number == 0:
        save_model(learner.saved, folder, base=learner.auxiliary, weights=weights)
    if share.number == 0:
        _write_template_and_ends(job, folder)
    return files


def trained_here(learner: Learner) -> dict[str, Tensor]:
    """The saved tensors that training changes, as this rank holds them: whole, or its rows."""
    if not learner.placement.cut:
        return changing(learner.saved)
    return {name: each.detach() for name, each in learner.placement.parameters.items()} | saved_buffers(learner.model)


def _write_template_and_ends(job: Job, folder: Path) -> None:
    """The chat template with which the rows were rendered, and the end tokens that were learned."""
    model, tokenizer, report = job.config.model, job.data.tokenizer, job.data.prepared.report
    if model.chat_template is not None:
        shutil.copyfile(model.chat_template, folder / "chat_template.jinja")
    if report.system_merged or (model.system_role == "merge" and report.format != "text"):
        (folder / "chat_template.jinja").write_text(tokenizer.template.text, encoding="utf-8")
    if tokenizer.new_tokens:
        write_new_tokens(folder, tokenizer.new_tokens, tokenizer.describe())
    if model.eos_token is not None:
        name_eos(folder, model.eos_token)
    rows = job.learner.model.config.get_text_config().vocab_size
    name_ends(folder, job.learner.base, learned_ends(tokenizer, chats=report.format != "text"), rows=rows)


def write_final(job: Job, paths: RunPaths, world: World) -> None:
    """Write the trained model as one plain folder; all ranks call it, with the `world` of the run's saves."""

    def fill(folder: Path) -> None:
        write_model(job, folder, world=world)

    if world.is_main:
        store.write_folder(paths.final, fill)
    elif job.learner.placement.cut:
        write_model(job, paths.final, TAKES_PART, world=world)


def require_space(job: Job, paths: RunPaths) -> int:
    """Raise SaveFailed when the disk has no room for a checkpoint; called before the first step, when nothing is lost yet.

    Returns the bytes that a checkpoint takes; 0 on other ranks than the main one.
    """
    if not job.session.world.is_main:
        return 0
    needed = store.space_needed(paths, _future_moments(job))
    store.require_space(paths.root, needed)
    return needed


def _future_moments(job: Job) -> dict[str, Tensor | TensorSlices]:
    """Tensors as large as AdamW's moments, also before the first update; those of other optimizers take less. And what adapters keep."""
    placement, world, names = job.learner.placement, job.session.world, ("exp_avg", "exp_avg_sq")
    return (
        starts_of(job.learner.model)
        | projections_of(job.learner.model)
        | {
            f"{name}.{moment}": placement.pieces(name, each.detach(), world)
            for name, each in placement.parameters.items()
            for moment in names
        }
    )


@dataclass(frozen=True)
class _Content:
    """The tensors of a checkpoint, as this rank holds them."""

    moments: dict[str, Tensor]
    weights: dict[str, Tensor]


class Saver:
    """Saves checkpoints of a run: in the loop, or in a thread of its own from copies of the tensors that training changes."""

    def __init__(self, job: Job, paths: RunPaths, recorder: Recorder, loader: Steps, clock: PartClock) -> None:
        self._job, self._paths, self._recorder, self._loader, self._clock = job, paths, recorder, loader, clock
        self._moments_copy, self._weights_copy = Snapshot(), Snapshot()
        self._began = False
        """Whether a save has begun since the last update."""
        self._hook = job.learner.optimizer.register_step_pre_hook(lambda *_: self._hold_updates_back())
        self._thread = writer_thread()
        self._why_in_loop: str | None = "" if job.config.checkpoint.async_ else "checkpoint.async is false"
        """None: saves run in the thread. Empty: not decided yet."""

    @cached_property
    def world(self) -> World:
        """The ranks as saves talk to each other: apart from the exchanges of the loop, and with more time, because a disk may be slow.

        All ranks ask for it the first time at the same moment.
        """
        seconds = max(interval(self._job.config.distributed.timeout).value, _SLOWEST_S)
        return self._job.session.world.beside(timedelta(seconds=seconds))

    def save(self, state: TrainerState) -> Path:
        """Commit a checkpoint together with all other ranks; rank 0 retires old ones."""
        self._record_rows(state)
        return self._commit(state, _Content(self._moments(), trained_here(self._job.learner)))()

    def save_async(self, state: TrainerState) -> Future[ReportSave] | None:
        """Begin to copy and write the tensors of this moment; the save before must be done. None where the loop has to wait.

        All ranks call it after the same step. If there is no memory for the copies on one of them, the save fails on all.
        """
        if self._why_in_loop == "":
            self._decide(state.step)
        if self._why_in_loop is not None:
            return None
        learner, failed = self._job.learner, None
        try:
            self._moments_copy.begin(self._moments())
            self._weights_copy.begin(trained_here(learner), passes_change={name for name, _ in learner.saved.named_buffers()})
        except store.SaveFailed as error:
            failed = error
        self._began = True
        report = self._thread.submit(self._write, state, failed)
        self._record_rows(state)
        return report

    def _decide(self, step: int) -> None:
        """Agree with the other ranks on whether saves run beside the loop."""
        self._why_in_loop = next((each for each in self.world.gather(self._why_not_async()) if each is not None), None)
        if self._why_in_loop is not None:
            self._recorder.event("saves-in-the-loop", step=step, why=self._why_in_loop)

    def close(self) -> None:
        """End the thread after the save that is under way."""
        self._hook.remove()
        self._thread.shutdown()

    def _write(self, state: TrainerState, failed: store.SaveFailed | None) -> ReportSave:
        """In the thread. Also a rank without copies takes part, because the others wait for it."""
        content: _Content | store.SaveFailed
        try:
            content = failed or _Content(self._moments_copy.copies(), self._weights_copy.copies())
        except store.SaveFailed as error:
            content = error
        return self._commit(state, content)

    def _hold_updates_back(self) -> None:
        if not self._began:
            return
        self._began = False
        with self._clock.part("save"):
            for copy in (self._moments_copy, self._weights_copy):
                copy.hold_back()

    def _moments(self) -> dict[str, Tensor]:
        return optimizer_tensors(self._job.learner.optimizer, self._job.learner.placement.parameters)

    def _record_rows(self, state: TrainerState) -> None:
        """Record what became of the rows of a stream so far."""
        if self._job.data.prepared.streams:
            self._recorder.event("rows", step=state.step, **self._loader.seen.sums())

    def _why_not_async(self) -> str | None:
        learner, world = self._job.learner, self._job.session.world
        weights, trained = trained_here(learner), learner.placement.parameters
        needed = sum(each.nbytes for each in weights.values()) + 2 * sum(each.nbytes for each in trained.values())
        if learner.placement.cut:
            needed += min(LARGEST_FILE, needed)  # the whole tensors of a file
        free = free_memory_bytes()
        if needed * _COPIES_THAT_FIT * world.local_size <= free:
            return None
        each = "" if world.local_size == 1 else " on each process"
        return f"a copy of what is saved takes {show_bytes(needed)}{each}, and {show_bytes(free)} of memory are free"

    def _commit(self, state: TrainerState, content: "_Content | store.SaveFailed") -> ReportSave:
        """Commit a checkpoint and retire old ones, in any thread; the returned function reports it in the thread of the loop.

        It ends on all ranks when rank 0 is done with the old ones. Raises SaveFailed on all ranks.
        """
        job, paths, world = self._job, self._paths, self.world
        content = _agreed(world, content)
        folder = save_together(
            world,
            paths,
            state=state,
            config_text=dump_config(job.settings),
            fingerprints=Fingerprints(job.data.prepared.fingerprint, job.learner.base_fingerprint),
            writes=self._writes(content),
            optimizer_values={"kind": job.config.training.optimizer},
            needed=lambda: store.space_needed(paths, _future_moments(job)),
        )
        problems = self._retire() if world.is_main else []
        world.barrier()  # no rank waits for rank 0 in a step, where less time is allowed

        def report() -> Path:
            if job.session.world.is_main:
                self._recorder.event("saved", step=state.step, folder=folder.name)
            for problem in problems:
                job.session.progress.warn(f"{problem.where}: {problem.message}", "the run goes on")
            return folder

        return report

    def _retire(self) -> list[Problem]:
        """Delete old checkpoints; the new one is committed, so what goes wrong is only reported."""
        kept, problems = self._job.config.checkpoint, list[Problem]()
        ages = [parse_interval(age).value for age in kept.keep_ages]
        try:
            retention.apply(self._paths, keep_last=kept.keep_last, keep_best=kept.keep_best, keep_ages=ages, warn=problems.append)
        except OSError as error:
            message = f"old checkpoints could not be looked at: {error.strerror}; they only take up space"
            problems.append(Problem(code="checkpoint.delete-failed", message=message, where=str(self._paths.root)))
        return problems

    def _writes(self, content: _Content) -> dict[str, Write]:
        """What fills the folders of a checkpoint."""
        placement, world = self._job.learner.placement, self.world
        moments = {name: placement.pieces(name.rpartition(".")[0], each, world) for name, each in content.moments.items()}
        return {
            store.MODEL: lambda folder, share: write_model(self._job, folder, share, weights=content.weights, world=world),
            store.TENSORS: lambda folder, share: write_files(folder, "optimizer", moments, part=share).mine,
        }


def _agreed(world: World, content: "_Content | store.SaveFailed") -> _Content:
    """`content`, if every rank has some; otherwise all raise the first error, before any of them waits for rows of another."""
    failed = content if isinstance(content, store.SaveFailed) else None
    problems = world.gather(asdict(failed.problems[0]) if failed is not None else None)
    for each in problems:
        if each is not None:
            raise store.SaveFailed(Problem(**each)) from failed
    assert not isinstance(content, store.SaveFailed)
    return content
