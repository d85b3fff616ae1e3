"""The clock of a run: a plain one, or one that profiles the steps that monitoring.profile names. Only rank 0 profiles."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from llamahome.assembly import Job
from llamahome.checkpoint.state import TrainerState
from llamahome.model.layer_kinds import adapter_ranks, layer_kinds
from llamahome.monitoring.throughput import PartClock
from llamahome.rundir import RunPaths
from llamahome.units import parse_steps


def make_clock(job: Job, paths: RunPaths, state: TrainerState, closing: ExitStack, *, watch: Callable[[str], None]) -> PartClock:
    """The clock of the parts of a step, of which `watch` hears; `closing` writes a profile that the end of the run cut short."""
    backend, asked, say = job.data.backend, job.config.monitoring.profile, job.session.progress.say
    if asked is None or not job.session.world.is_main:
        return PartClock(backend.timestamp, backend.seconds_between, watch=watch)
    from llamahome.monitoring.profiler import ProfiledClock, ProfilePlan, StepProfiler  # torch.profiler, which other runs do not need

    first, last = parse_steps(asked)
    model, snapshot = job.learner.model, paths.profile / "out-of-memory.pickle"
    if backend.snapshot_out_of_memory(snapshot):
        say(f"if memory runs out, {snapshot} will show what held it")
    plan = ProfilePlan(first, last, paths.profile, kinds=partial(layer_kinds, model), ranks=adapter_ranks(model), say=say)
    profiler = StepProfiler(plan, done=state.step)
    closing.callback(profiler.close)
    return ProfiledClock(backend.timestamp, backend.seconds_between, profiler, watch=watch)
