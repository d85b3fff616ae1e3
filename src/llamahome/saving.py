"""What a run leaves on the disk: checkpoints, written by all processes at once, and the final model as one plain folder."""

import shutil
from pathlib import Path

from torch import Tensor

from llamahome.assembly import Job, Learner, Session
from llamahome.checkpoint import retention, store
from llamahome.checkpoint.manifest import Fingerprints
from llamahome.checkpoint.state import TrainerState
from llamahome.checkpoint.together import save_together
from llamahome.config.load import dump_config
from llamahome.distributed.tensorfiles import TAKES_PART, WRITES_ALL, Part, Pieces, write_files
from llamahome.distributed.world import World
from llamahome.errors import Problem
from llamahome.model.adapter import save_in_parts, save_model
from llamahome.monitoring.recorder import Recorder
from llamahome.rundir import RunPaths
from llamahome.training.optimizer import optimizer_tensors


def write_model(job: Job, learner: Learner, folder: Path, part: Part = WRITES_ALL) -> list[Path]:
    """Fill `folder` with what was trained and the chat template that it was trained with.

    Where weights are sharded all processes call it. Returns the files of weights that this process wrote, if several did.
    """
    files: list[Path] = []
    if learner.placement.cut or (part.count > 1 and learner.saved is learner.model):
        weights = {name: learner.placement.pieces(name, each.detach()) for name, each in learner.parameters.items()}
        files = save_in_parts(learner.model, folder, base=learner.base, weights=weights, part=part)
    elif part.number == 0:
        save_model(learner.saved, folder, base=learner.base)
    if job.loaded.config.model.chat_template is not None and part.number == 0:
        shutil.copyfile(job.loaded.config.model.chat_template, folder / "chat_template.jinja")
    return files


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
    world, checkpoint = session.world, job.loaded.config.checkpoint
    moments = optimizer_tensors(learner.optimizer, learner.parameters)
    whole = {name: learner.placement.pieces(name.rpartition(".")[0], each) for name, each in moments.items()}
    save_together(
        world,
        paths,
        state=state,
        config_text=dump_config(job.loaded),
        fingerprints=Fingerprints(job.prepared.fingerprint, learner.base_fingerprint),
        writes={
            store.MODEL: lambda folder, part: write_model(job, learner, folder, part),
            store.TENSORS: lambda folder, part: write_files(folder, "optimizer", whole, part=part).mine,
        },
        optimizer_values={"kind": job.loaded.config.training.optimizer},
        needed=store.space_needed(paths, whole),
    )
    if world.is_main:
        recorder.event("saved", step=state.step, folder=paths.checkpoint(state.step).name)

        def warn(problem: Problem) -> None:
            session.progress.warn(f"{problem.where}: {problem.message}", "the run goes on")

        retention.apply(paths, keep_last=checkpoint.keep_last, keep_best=checkpoint.keep_best, warn=warn)
    return paths.checkpoint(state.step)
