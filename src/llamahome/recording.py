"""Opens what records a run: log, metrics, the sampler of the machine, trackers, alerts, and the user's command for notifications.

Its end writes the report.
"""

import shlex
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from llamahome.assembly import Job
from llamahome.checkpoint.state import TrainerState
from llamahome.config.describe import settings
from llamahome.config.load import LoadedConfig
from llamahome.config.schema import interval
from llamahome.distributed.world import World
from llamahome.errors import LlamaHomeError
from llamahome.logs import log_to_file
from llamahome.model.layer_kinds import adapter_ranks, layer_kinds
from llamahome.monitoring.alerts import AlertSink, Watch, alert_fields
from llamahome.monitoring.charts.page import write_report
from llamahome.monitoring.display import RunSummary, write_summary
from llamahome.monitoring.episodes import Alert, Facts
from llamahome.monitoring.notify import Notifier
from llamahome.monitoring.ranks import Ranks
from llamahome.monitoring.recorder import Recorder
from llamahome.monitoring.resources import ResourceSampler
from llamahome.monitoring.runs import describe_energy
from llamahome.monitoring.sinks import harmless
from llamahome.monitoring.throughput import PartClock, measured_peak_flops
from llamahome.monitoring.trackers import TrackerSink
from llamahome.redaction import redact_values
from llamahome.rundir import RunPaths, as_typed, nearby
from llamahome.session import Session
from llamahome.training.learner import flops_per_token
from llamahome.training.run import max_seconds
from llamahome.units import parse_steps

MemoryPlan = Callable[[Job], Mapping[str, int] | None]
"""Plans the memory of a run that is ready. It comes from planning/, which is above this floor."""


def open_recorder(job: Job, paths: RunPaths, state: TrainerState, closing: ExitStack, *, checkpoint_bytes: int = 0) -> Recorder:
    """Open everything that records the run, and record that it begins; all ranks call it. `closing` closes it."""
    monitoring, world, report = job.config.monitoring, job.session.world, job.data.prepared.report
    closing.callback(log_to_file(paths.rank_log(world.rank)).close)
    sampler = _open_sampler(paths, world, interval(monitoring.system_every).value)
    resumes = bool(state.step or (paths.metrics_dir / "metrics.jsonl").exists())  # after step 0 when it starts again
    before = describe_energy(paths) if resumes and world.is_main else None  # before records of repeated steps are moved
    flops, peak = flops_per_token(job.learner.model, report.answer_share), _peak_flops(job)
    recorder = Recorder(
        paths.metrics_dir,
        tensorboard_dir=paths.tensorboard_dir if monitoring.tensorboard else None,
        is_main=world.is_main,
        resume_step=state.step if resumes else None,
        flops_per_token=flops,
        peak_flops=peak,
        warn=_warn(job),
        system=sampler.latest,
    )
    recorder.restore_totals(state.tokens, state.targets)
    recorder.describe(shown_settings(job.settings), paths.run_id)
    recorder.ranks = Ranks(world.rank, world.size, joules=sampler.joules, kwh_before=before)
    if world.is_main:
        _attach_trackers(job, paths, recorder)
        _attach_alerts(job, paths, state, recorder, sampler, checkpoint_bytes=checkpoint_bytes)
        if monitoring.notify is not None:
            notifier = Notifier(monitoring.notify, run=paths.run_id, warn=_warn(job))
            recorder.listen(notifier.event)
            closing.callback(notifier.close)
    closing.callback(recorder.close)
    sampler.start()
    closing.callback(sampler.stop)
    compute = str(job.data.backend.precision.compute).removeprefix("torch.")
    source = f"a square product in {compute}, measured on each of the {world.size} processes when the run began, summed"
    speed = {"flops_per_token": flops, "peak_flops": peak, "peak_is": source, "mfu": "flops_per_token * tokens_per_s / peak_flops"}
    recorder.event("resumed" if state.step else "started", step=state.step, horizon=job.plan.horizon, **speed)
    return recorder


def _open_sampler(paths: RunPaths, world: World, every: float) -> ResourceSampler:
    """Rank 0 writes system.jsonl, every other rank a file of its own; the first rank of each machine measures the machine."""
    if world.size == 1:
        return ResourceSampler(paths.metrics_dir / "system.jsonl", every)
    name = "system.jsonl" if world.is_main else f"system-rank-{world.rank}.jsonl"
    labels = {"rank": world.rank, "host": socket.gethostname()}
    return ResourceSampler(paths.metrics_dir / name, every, whole_machine=world.local_rank == 0, labels=labels)


def _peak_flops(job: Job) -> float:
    """The peak rates of all processes, summed, because the tokens of a step are those of all processes."""
    world = job.session.world
    peak = torch.tensor([measured_peak_flops(world.device, job.data.backend.precision.compute)], dtype=torch.float64)
    world.sum_(peak)
    return float(peak)


def _warn(job: Job) -> Callable[[str], None]:
    return lambda text: job.session.progress.say(f"warning: {text}")


def _attach_trackers(job: Job, paths: RunPaths, recorder: Recorder) -> None:
    folder = paths.metrics_dir.parent.parent
    facts = {"run": paths.run_id, "folder": str(folder), "settings": shown_settings(job.settings)}
    for name in dict.fromkeys(job.config.monitoring.trackers):
        recorder.attach(TrackerSink(name, paths.rank_log(0).with_name(f"tracker-{name}.log"), facts, warn=_warn(job)))


def shown_settings(loaded: LoadedConfig) -> dict[str, Any]:
    """Every setting by its dotted key, without secrets and the user's command, which may hold an address that is a secret."""
    values = {key: setting.of(loaded.config) for key, setting in settings().items() if key != "monitoring.notify"}
    return {key: redact_values(value) for key, value in values.items()}


def _attach_alerts(
    job: Job, paths: RunPaths, state: TrainerState, recorder: Recorder, sampler: ResourceSampler, *, checkpoint_bytes: int
) -> None:
    training = job.config.training
    facts = Facts(
        run=as_typed(paths.root),
        data=shlex.join(job.data.paths),
        horizon=job.plan.horizon,
        learning_rate=float(training.learning_rate),
        slower_rate=job.slower_rate(1 / 3),
        max_grad_norm=training.max_grad_norm,
        micro_batch_tokens=state.micro_batch_tokens,
        checkpoint_bytes=checkpoint_bytes,
        first_step=state.step,
    )

    def raise_(alert: Alert) -> None:
        recorder.event("alert", **alert_fields(alert, recorder.standing_out))
        job.session.progress.alert(alert.step, alert.text, alert.help)

    recorder.attach(AlertSink(Watch(facts), raise_, system=sampler.latest))


def first_line(error: BaseException) -> str:
    """What went wrong, on one line."""
    if isinstance(error, LlamaHomeError) and error.problems:
        return error.problems[0].message
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def with_memory_plan(job: Job, memory_plan: MemoryPlan | None) -> Job:
    """The job with the memory that `memory_plan` computes for it, on the main rank; a plan that fails is no reason not to train."""
    if memory_plan is not None and job.session.world.is_main:
        with harmless("the planned memory is not recorded", job.session.progress.say):
            return replace(job, planned_memory=memory_plan(job))
    return job


def begin_to_show(job: Job, paths: RunPaths, state: TrainerState) -> None:
    """Show the summary of the run, here and to those who watch its files."""
    summary = _summary(job, paths, state)
    if job.session.world.is_main:
        with harmless(f"{paths.metrics_dir}/summary.json is not written", job.session.progress.say):
            write_summary(paths.metrics_dir, summary)
    job.session.progress.start(summary)


def write_report_of(session: Session, paths: RunPaths) -> None:
    """Write report.html, as the run now ends."""
    if session.world.is_main:
        with harmless(f"{paths.report} is not written", session.progress.say):
            write_report(paths)


def _summary(job: Job, paths: RunPaths, state: TrainerState) -> RunSummary:
    """What is known before the first step, for people."""
    prepared, config, plan = job.data.prepared, job.config, job.plan
    rows = min(int(config.training.batch_size), plan.positions)  # a run may have fewer rows than a step may hold
    each, limit = prepared.report.row_examples, max_seconds(config.training)
    return RunSummary(
        run_id=paths.run_id,
        model=config.model.name,
        method=config.training.method if config.training.objective == "sft" else f"{config.training.objective} {config.training.method}",
        trained_share=job.learner.trained_share,
        train_rows=prepared.report.train_examples // each,
        eval_rows=len(prepared.evaluation) // each if prepared.evaluation is not None else 0,
        mean_tokens=prepared.report.mean_tokens * each,
        target_share=prepared.report.targets / prepared.report.tokens,
        batch_size=rows,
        tokens_per_step=prepared.report.tokens_per_row * rows,
        micro_batch_tokens=state.micro_batch_tokens,
        processes=job.session.world.size,
        horizon=plan.horizon,
        epochs=plan.horizon / plan.steps_per_epoch,
        folder=str(nearby(paths.root)),
        first_step=state.step,
        ends_at=None if limit is None else time.time() + limit - state.elapsed_s,
        planned_memory=None if job.planned_memory is None else dict(job.planned_memory),
    )


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
