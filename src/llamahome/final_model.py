"""Which step becomes final/: the last one, or with output.final best the checkpoint with the best evaluation, copied as it is.

The untrained model has no checkpoint. Where it was best, final/ is the best checkpoint that exists, and the summary says so.
"""

import shutil
from pathlib import Path

from llamahome.assembly import Job
from llamahome.checkpoint import manifest, store
from llamahome.checkpoint.state import STATE, TrainerState, judged_cost, read_state
from llamahome.distributed.world import World
from llamahome.errors import CheckpointError
from llamahome.monitoring.display import metric_name
from llamahome.rundir import RunPaths
from llamahome.saving import write_final
from llamahome.units import many


def write_chosen(job: Job, paths: RunPaths, state: TrainerState, world: World) -> str | None:
    """Write final/; all ranks call it, with the `world` of the run's saves, and wait until it is written.

    Returns which step it is and why, None if that is the last step because no other was asked for.
    """
    note = _write_chosen(job, paths, state, world)
    world.barrier()
    return note


def _write_chosen(job: Job, paths: RunPaths, state: TrainerState, world: World) -> str | None:
    if job.config.output.final == "last":
        write_final(job, paths, world)
        return None
    metric = job.config.evaluation.metric
    chosen = world.broadcast_object(_best_checkpoint(paths, metric) if world.is_main else None)
    if chosen is None:
        write_final(job, paths, world)
        return f"final/ is the last step, {state.step:,}: no checkpoint has a finite evaluation of {metric_name(metric)}"
    step, cost = chosen
    if world.is_main:
        source = paths.checkpoint(step) / store.MODEL
        store.write_folder(paths.final, lambda folder: _copy(source, folder))
    return _explain(metric, state, step, cost)


def _best_checkpoint(paths: RunPaths, metric: str) -> tuple[int, float] | None:
    """Step and cost of the best whole checkpoint of this run, the earlier of equal ones; None if none was evaluated."""
    found: list[tuple[float, int]] = []
    for step, folder in paths.checkpoints():
        try:
            cost = judged_cost(read_state(folder / STATE), metric)
            if cost is not None and manifest.read(folder).run_id == paths.run_id and not manifest.verify(folder):
                found.append((cost, step))
        except CheckpointError:
            continue
    return (min(found)[1], min(found)[0]) if found else None


def _copy(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)


def _explain(metric: str, state: TrainerState, step: int, cost: float) -> str:
    """Which step final/ is, with its value, the number of evaluations and the last step's value."""
    judged, name = state.extra.get("judged", {}), metric_name(metric)
    count, best_step = int(judged.get("evaluations", 1)), state.best_step
    value, best = abs(cost), judged.get("best")
    last = judged.get("value") if judged.get("step") == state.step else None
    after = f"; the last step's was {last:.4f}" if last is not None and step != state.step else ""
    here = f"final/ is step {step:,}" + (", the last step and" if step == state.step else ",")
    if best_step == step:
        return f"{here} the best of {many(count, 'evaluation')}: {name} {value:.4f}{after}"
    if best_step == 0:
        why = f"no step of training is better than the untrained model ({name} {best:.4f} at step 0)"
        rest = f"the best of {many(count - 1, 'evaluation')} after it" if judged.get("trained_step") == step else "the best that is saved"
        return f"{why}; {here} {rest}: {name} {value:.4f}{after}"
    known = f" ({name} {best:.4f})" if best is not None else ""
    why = f"the best evaluation was at step {best_step}{known}, whose checkpoint is not there or damaged"
    return f"{why}; {here} the best that is saved: {name} {value:.4f}{after}"
