"""How many runs of a sweep go side by side here, and how long all of them take."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llamahome.units import many, show_bytes, show_seconds

if TYPE_CHECKING:
    from llamahome.planning.estimate import Estimate
    from llamahome.sweep.grid import Grid, Trial

_PROCESS_BYTES = 400 * 2**20
"""Of torch and transformers in each process, beside what the planner counts. measured: 391 MiB after the imports."""
_USABLE = 0.9
"""Share of the free memory that the runs may plan for together."""
_WITHOUT_MEMORY = frozenset(f"training.{name}" for name in ("learning_rate", "seed", "epochs", "max_steps", "max_time", "weight_decay"))
"""Settings that change nothing of the memory of a run."""
Say = Callable[[str], None]


def make_slots(jobs: int | None, grid: "Grid", data_paths: Sequence[str], *, say: Say) -> Sequence[Mapping[str, str]]:
    """The environment of each run at a time: one GPU each, or a share of the processors and of the memory.

    Raises UsageError if the devices cannot hold the `jobs` that were typed.
    """
    from llamahome.distributed.gpus import one_for_each_process
    from llamahome.errors import Problem, UsageError

    if any(loaded.config.distributed.world_size not in ("auto", 1) for loaded in grid.loaded):
        if jobs not in (None, 1):
            message = "a run of several processes uses all devices, so runs cannot be side by side"
            raise UsageError(Problem(code="usage.bad-choice", message=message, where="--jobs", hint="--jobs 1"))
        return [{}]
    gpus = one_for_each_process() if all(loaded.config.model.backend != "cpu" for loaded in grid.loaded) else []
    if gpus:
        if jobs is not None and jobs > len(gpus):
            message = f"{jobs} runs at a time need {jobs} GPUs; {len(gpus)} are here"
            raise UsageError(Problem(code="usage.bad-choice", message=message, where="--jobs", hint=f"--jobs {len(gpus)}"))
        return gpus[: min(jobs or len(gpus), len(grid.trials))]
    count = min(jobs or 1, len(grid.trials))
    if count > 1:
        count = _fitting(count, grid, data_paths, say)
    threads = max(1, len(os.sched_getaffinity(0)) // count) if hasattr(os, "sched_getaffinity") else 1
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))} if count > 1 else {}] * count


def _fitting(count: int, grid: "Grid", data_paths: Sequence[str], say: Say) -> int:
    """How many of the largest runs fit into the free memory together, at most `count` and at least one."""
    found = _estimates(grid, data_paths, say, apart=_WITHOUT_MEMORY)
    setting = max(found, key=lambda each: found[each].step.memory.total)
    needed, free = found[setting].step.memory.total + _PROCESS_BYTES, int(_USABLE * found[setting].free_bytes)
    fitting = max(1, min(count, free // needed))
    if fitting < count:
        figures = f"one needs {show_bytes(needed)} and {show_bytes(free)} may be used"
        say(f"--jobs {count} is more than the memory holds: {many(fitting, 'run')} at a time, because {figures}")
    return fitting


def _estimates(grid: "Grid", data_paths: Sequence[str], say: Say, *, apart: frozenset[str] = frozenset()) -> dict[Any, "Estimate"]:
    """One estimate for all trials whose listed values are equal but for the keys `apart` and the seed."""
    from llamahome.cli.train import importing_torch

    with importing_torch():
        from llamahome.planning import estimate

    known: dict[Any, Estimate] = {}
    for trial, loaded in zip(grid.trials, grid.loaded, strict=True):
        key = _key(trial, apart)
        if key not in known:
            known[key] = estimate.estimate(data_paths, loaded, say=say if not known else lambda _: None)
    return known


def _key(trial: "Trial", apart: frozenset[str]) -> tuple[tuple[str, str], ...]:
    return tuple((key, value) for key, value in trial.setting if key not in apart)


def show_plan(grid: "Grid", data_paths: Sequence[str], at_once: int, *, as_json: bool, say: Say) -> None:
    """Print how many runs there are, and steps, time and memory of each; raises UsageError for runs of several processes."""
    from llamahome.errors import Problem, UsageError

    if any(loaded.config.distributed.world_size not in ("auto", 1) for loaded in grid.loaded):
        message = "a plan that reads rows is for one process"
        raise UsageError(Problem(code="sweep.no-plan", message=message, where="distributed.world_size"))
    known = _estimates(grid, data_paths, say)
    plans: list[dict[str, Any]] = []
    for trial in grid.trials:
        found = known[_key(trial, frozenset())]
        named = {"trial": trial.name, "values": trial.values, "seed": trial.seed}
        figures = {"memory_bytes": found.step.memory.total, "fits": found.step.fits, "disk_bytes": found.disk_bytes}
        plans.append({**named, "steps": found.plan.horizon, "seconds": found.seconds, **figures})
    seconds = sum(plan["seconds"] for plan in plans) / at_once
    if as_json:
        print(json.dumps({"runs": len(plans), "jobs": at_once, "seconds": seconds, "trials": plans}))
        return
    for plan in plans:
        shown = "".join(f"{key}={value}, " for key, value in plan["values"].items())
        memory = show_bytes(plan["memory_bytes"]) + ("" if plan["fits"] else ", does not fit")
        print(f"{plan['trial']}  {shown}seed {plan['seed']}: {plan['steps']} steps, about {show_seconds(plan['seconds'])}, {memory}")
    print(f"{len(plans)} runs, {at_once} at a time: about {show_seconds(seconds)}, without starting, evaluations and saving")
