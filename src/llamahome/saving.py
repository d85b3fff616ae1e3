"""What a run writes of its model: checkpoints, written by all ranks at once, and the final model as one plain folder."""

import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
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
from llamahome.distributed.tensorfiles import TAKES_PART, WRITES_ALL, TensorSlices, WriterShare, write_files
from llamahome.distributed.world import World
from llamahome.errors import Problem
from llamahome.model.adapter import changing, save_in_parts, save_model
from llamahome.model.end_tokens import name_ends, name_eos
from llamahome.model.lora_init import starts_of
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


def write_model(job: Job, folder: Path, share: WriterShare = WRITES_ALL, *, weights: Mapping[str, Tensor] | None = None) -> list[Path]:
    """Fill `folder` with the trained weights, the chat template and the end tokens.

    `weights` are copies that are written instead of the model's own; of sharded weights there are none. All ranks call it when weights are
    sharded. Returns the weight files that this rank wrote if several ranks write.
    """
    files: list[Path] = []
    learner = job.learner
    placement = learner.placement
    if placement.cut or (share.count > 1 and learner.saved is learner.model):
        own = {name: placement.pieces(name, each.detach()) for name, each in placement.parameters.items()}
        pieces = own if weights is None else weights
        files = save_in_parts(learner.model, folder, base=learner.auxiliary, weights=pieces, part=share)
    elif share.number == 0:
        save_model(learner.saved, folder, base=learner.auxiliary, weights=weights)
    if share.number == 0:
        _write_template_and_ends(job, folder)
    return files


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


def write_final(job: Job, paths: RunPaths) -> None:
    """Write the trained model as one plain folder; all ranks call it."""

    def fill(folder: Path) -> None:
        write_model(job, folder)

    if job.session.world.is_main:
        store.write_folder(paths.final, fill)
    elif job.learner.placement.cut:
        write_model(job, paths.final, TAKES_PART)


def require_space(job: Job, paths: RunPaths) -> int:
    """Raise SaveFailed when the disk has no room for a checkpoint; called before the first step, when nothing is lost yet.

    Returns the bytes that a checkpoint takes; 0 on other ranks than the main one.
    """
    if not job.session.world.is_main:
        return 0
    needed = store.space_needed(paths, _future_moments(job.learner))
    store.require_space(paths.root, needed)
    return needed


def _future_moments(learner: Learner) -> dict[str, Tensor | TensorSlices]:
    """Tensors as large as AdamW's moments, also before the first update; those of other optimizers take less. And the adapters' starts."""
    placement, names = learner.placement, ("exp_avg", "exp_avg_sq")
    return starts_of(learner.model) | {
        f"{name}.{moment}": placement.pieces(name, each.detach()) for name, each in placement.parameters.items() for moment in names
    }


@dataclass(frozen=True)
class _Content:
    """The tensors of a checkpoint."""

    moments: dict[str, Tensor]
    weights: dict[str, Tensor] | None = None
    """None: those of the model."""


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
        self._beside = job.session.world
        """The processes as the thread talks to them."""

    def save(self, state: TrainerState) -> Path:
        """Commit a checkpoint together with all other ranks; rank 0 retires old ones."""
        self._record_rows(state)
        return self._commit(state, _Content(self._moments()), self._job.session.world)()

    def save_async(self, state: TrainerState) -> Future[ReportSave] | None:
        """Begin to copy and write the tensors of this moment; the save before must be done. None where the loop has to wait.

        All ranks call it after the same step. If there is no memory for the copies on one of them, the save fails on all.
        """
        if self._why_in_loop == "":
            self._decide(state.step)
        if self._why_in_loop is not None:
            return None
        saved, failed = self._job.learner.saved, None
        try:
            self._moments_copy.begin(self._moments())
            self._weights_copy.begin(changing(saved), passes_change={name for name, _ in saved.named_buffers()})
        except store.SaveFailed as error:
            failed = error
        self._began = True
        report = self._thread.submit(self._write, state, failed)
        self._record_rows(state)
        return report

    def _decide(self, step: int) -> None:
        """Agree with the other ranks on whether saves run beside the loop."""
        world, why = self._job.session.world, self._why_not_async()
        self._why_in_loop = next((each for each in world.gather(why) if each is not None), None)
        if self._why_in_loop is not None:
            self._recorder.event("saves-in-the-loop", step=step, why=self._why_in_loop)
        else:
            self._beside = world.beside(timedelta(seconds=interval(self._job.config.distributed.timeout).value))

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
        return self._commit(state, content, self._beside)

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
        learner = self._job.learner
        if learner.placement.strategy != "replicate":
            return "weights are sharded, and passes and saves would change them at the same time"
        needed = sum(tensor.nbytes for tensor in changing(learner.saved).values())
        needed += sum(moment.nbytes for moment in _future_moments(learner).values())
        free = free_memory_bytes()
        if needed * _COPIES_THAT_FIT * self._job.session.world.local_size <= free:
            return None
        each = "" if self._job.session.world.local_size == 1 else " on each process"
        return f"a copy of what is saved takes {show_bytes(needed)}{each}, and {show_bytes(free)} of memory are free"

    def _commit(self, state: TrainerState, content: "_Content | store.SaveFailed", world: World) -> ReportSave:
        """Commit a checkpoint and retire old ones, in any thread; the returned function reports it in the thread of the loop."""
        job, paths, checkpoint = self._job, self._paths, self._job.config.checkpoint
        folder = save_together(
            world,
            paths,
            state=state,
            config_text=dump_config(job.settings),
            fingerprints=Fingerprints(job.data.prepared.fingerprint, job.learner.base_fingerprint),
            writes=self._writes(content),
            optimizer_values={"kind": job.config.training.optimizer},
            needed=store.space_needed(paths, _future_moments(job.learner)),
        )
        problems: list[Problem] = []
        if world.is_main:
            ages = [parse_interval(age).value for age in checkpoint.keep_ages]
            retention.apply(paths, keep_last=checkpoint.keep_last, keep_best=checkpoint.keep_best, keep_ages=ages, warn=problems.append)

        def report() -> Path:
            if job.session.world.is_main:
                self._recorder.event("saved", step=state.step, folder=folder.name)
            for problem in problems:
                job.session.progress.warn(f"{problem.where}: {problem.message}", "the run goes on")
            return folder

        return report

    def _writes(self, content: "_Content | store.SaveFailed") -> dict[str, Write]:
        """What fills the folders of a checkpoint; a rank without content fails where the others learn it."""
        if isinstance(content, store.SaveFailed):
            failed = content

            def fail(folder: Path, share: WriterShare) -> list[Path]:
                raise failed

            return {store.MODEL: fail, store.TENSORS: fail}
        placement, weights = self._job.learner.placement, content.weights
        moments = {name: placement.pieces(name.rpartition(".")[0], each) for name, each in content.moments.items()}
        return {
            store.MODEL: lambda folder, share: write_model(self._job, folder, share, weights=weights),
            store.TENSORS: lambda folder, share: write_files(folder, "optimizer", moments, part=share).mine,
        }
