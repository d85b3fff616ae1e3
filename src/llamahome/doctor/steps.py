"""Does two real steps on the user's rows with the user's settings, and says where their time goes.

The parts are made as `train` makes them, on one process, and with few rows a step so that it takes seconds; nothing is recorded as a run,
and the model that is saved on trial is removed with the folder of the checks.
"""

import math
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from llamahome.assembly import Job, assemble, make_loader, read_data
from llamahome.config.load import with_assignments
from llamahome.data.sample import write_few
from llamahome.doctor.checks import Check, Request, failed, passed, warned
from llamahome.doctor.settings import load_settings, of_problems
from llamahome.errors import LlamaHomeError
from llamahome.monitoring.resources import free_memory_bytes, process_memory
from llamahome.monitoring.throughput import PartClock
from llamahome.reference_values import with_reference
from llamahome.rundir import RAW_DATA, RUNS, RunPaths
from llamahome.saving import require_space, write_model
from llamahome.session import open_session
from llamahome.training.loss_scale import LossScale, Overflowed
from llamahome.training.memory import RanOut
from llamahome.training.optimizer import set_learning_rate
from llamahome.training.run import first_state
from llamahome.training.spikes import Limits
from llamahome.training.step import step_seed, train_step
from llamahome.units import many, show_bytes, show_seconds

_STEPS = 2
_TOKENS = 400
"""Of a step: on a slow processor the starter learns 150 a second."""
_ACCELERATED = 16
"""How many times as many on a device that is not the processor."""
_ONE_PROCESS = ("distributed.world_size=1", "distributed.num_nodes=1", "distributed.node_rank=0", "data.streaming=true")
_SLOW_DATA = 0.25
"""Share of a step beyond which the rows are what it waits for."""
_TIGHT_MEMORY = 0.85
_LARGEST_SAVE = 2 * 2**30


@dataclass(frozen=True)
class StepTimes:
    """What the two steps came to."""

    source: str
    """The rows."""
    rows: int
    """Of each of the two steps."""
    tokens: int
    """Of the second step."""
    batch_size: int
    """Rows of a step of a run with these settings."""
    seconds: tuple[float, ...]
    parts: dict[str, float]
    """Seconds of the second step by part: data, forward, backward, exchange, update."""
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    reduced: bool
    """Whether products are in a reduced number type."""
    peak: int
    """Bytes of this process at most."""
    free: int
    """Bytes that were still free afterwards."""
    prepared_s: float
    """Reading rows and loading the model."""
    saved_s: float | None
    """Writing the model; None if it is large and was not written."""
    ran_out: str | None = None


def step_checks(request: Request) -> Iterator[Check]:
    """Do the steps, and judge them. A mistake in rows or settings is a failed check."""
    try:
        yield from time_checks(measure_steps(request))
    except LlamaHomeError as error:
        yield of_problems("two-steps", error.problems)


def measure_steps(request: Request) -> StepTimes:
    """Make the parts of a run and do two steps. Raises LlamaHomeError as `train` does."""
    loaded = load_settings(request, _ONE_PROCESS)
    rows, source = _rows(request)
    began = time.perf_counter()
    with open_session(loaded, saves=False) as session:
        data = read_data(session, loaded, rows)
        job = with_reference(assemble(session, data))
        prepared_s = time.perf_counter() - began
        output = job.config.output.dir
        folder = next(each for each in (Path(output or RUNS).absolute(), *Path(output or RUNS).absolute().parents) if each.is_dir())
        require_space(job, RunPaths(folder, "doctor"))
        return replace(_steps(job), source=source, prepared_s=prepared_s, saved_s=_save(job, Path(request.scratch)))


def _rows(request: Request) -> tuple[tuple[str, ...], str]:
    """The rows that were typed, or those of the usual folder, or a few of the sample data; and how to name them."""
    if request.data:
        return request.data, shlex.join(request.data)
    if any(path.is_file() and not path.name.startswith(".") for path in RAW_DATA.rglob("*")):
        return (str(RAW_DATA),), str(RAW_DATA)
    sample = Path(request.scratch) / "sample.jsonl"
    write_few(sample)
    return (str(sample),), "sample data"


def _steps(job: Job) -> StepTimes:
    """Two steps of few rows."""
    report, backend, learner, training = job.data.prepared.report, job.data.backend, job.learner, job.config.training
    batch_size, device = int(training.batch_size), job.session.world.device
    most = _TOKENS if device.type == "cpu" else _TOKENS * _ACCELERATED
    rows = max(1, min(batch_size, int(most / max(1.0, report.tokens_per_row)), job.plan.positions // _STEPS))
    small = replace(job, settings=with_assignments(job.settings, [f"training.batch_size={rows}"]))
    loader = make_loader(small, first_state(int(training.micro_batch_tokens)))
    job.session.closing.callback(loader.close)
    clock = PartClock(backend.timestamp, backend.seconds_between)
    seconds, losses, norms, tokens = [], [], [], 0
    parts: dict[str, float] = {}
    ran_out = None
    scale = LossScale() if learner.objective.backend.precision.compute == torch.float16 else None
    limits, reducer = Limits(training.max_grad_norm, scale=scale), learner.placement.exchange
    update = partial(train_step, learner.objective.loss_sum, learner.optimizer, limits=limits, reducer=reducer, clock=clock)
    for step in range(_STEPS):
        clock.cut()
        started = time.perf_counter()
        with clock.part("data"):
            batch = next(loader, None)
        if batch is None:
            break
        set_learning_rate(learner.optimizer, float(training.learning_rate))
        counts = [sum(each) for each in zip(*map(learner.objective.units, batch.microbatches), strict=True)]
        while isinstance(result := update(batch.microbatches, divisors=counts, seed=step_seed(training.seed, step)), Overflowed):
            pass
        if isinstance(result, RanOut):
            ran_out = result.message or "no more memory"
            break
        losses.append(float(result.loss))  # waits for the device
        norms.append(float(result.grad_norm))
        seconds.append(time.perf_counter() - started)
        parts, tokens = clock.cut().read(), batch.num_tokens
    return StepTimes(
        source="",
        rows=rows,
        tokens=tokens,
        batch_size=min(batch_size, job.plan.positions),
        seconds=tuple(seconds),
        parts=parts,
        losses=tuple(losses),
        grad_norms=tuple(norms),
        reduced=backend.precision.name == "bf16",
        peak=process_memory()[1],
        free=free_memory_bytes(),
        prepared_s=0.0,
        saved_s=None,
        ran_out=ran_out,
    )


def _save(job: Job, scratch: Path) -> float | None:
    """Seconds that writing the final model takes. Raises MachineError."""
    size = sum(each.numel() * 4 for each in job.learner.placement.parameters.values())
    if size > _LARGEST_SAVE:
        return None
    started = time.perf_counter()
    folder = scratch / "final"
    folder.mkdir()
    write_model(job, folder)
    return time.perf_counter() - started


def time_checks(times: StepTimes) -> Iterator[Check]:
    """Whether the steps were right, and what slows them down."""
    smaller = "export LLAMAHOME_TRAINING__MICRO_BATCH_TOKENS=512 LLAMAHOME_TRAINING__GRADIENT_CHECKPOINTING=true"
    if times.ran_out is not None:
        yield failed("two-steps", f"memory ran out in a step of {many(times.rows, 'row')}: {times.ran_out[:120]}", smaller)
        return
    losses = " -> ".join(f"{loss:.3f}" for loss in times.losses)
    if not all(math.isfinite(each) for each in (*times.losses, *times.grad_norms)):
        text = f"loss {losses}, gradient {', '.join(f'{norm:.3g}' for norm in times.grad_norms)}: not finite"
        yield failed("two-steps", text, "export LLAMAHOME_TRAINING__MIXED_PRECISION=false" if times.reduced else None)
        return
    last = times.seconds[-1]
    named = ", ".join(f"{name} {seconds / last:.0%}" for name, seconds in times.parts.items() if seconds >= 0.005 * last)
    whole = last * times.batch_size / times.rows
    took = " and ".join(f"{seconds:.2f} s" for seconds in times.seconds)
    done = f"{many(len(times.seconds), 'step')} of {many(times.rows, 'row')} of {times.source} ({times.tokens:,} tokens)"
    took_by = f"{done} in {took}: {named}; loss {losses}"
    yield passed("two-steps", f"{took_by}; a step of {many(times.batch_size, 'row')} takes about {show_seconds(whole)}")
    waited = times.parts.get("data", 0.0) / last
    saved = "" if times.saved_s is None else f", {times.saved_s:.1f} s to save the model"
    detail = f"{times.prepared_s:.1f} s to read rows and load the model, {waited:.0%} of a step waiting for rows{saved}"
    if waited > _SLOW_DATA and last > 0.1:
        yield warned("data-loading", detail, "export LLAMAHOME_DATA__STREAMING=false")
    else:
        yield passed("data-loading", detail)
    detail = f"at most {show_bytes(times.peak)} for these steps, {show_bytes(times.free)} still free"
    if times.peak > _TIGHT_MEMORY * (times.peak + times.free):
        yield warned("step-memory", f"{detail}; longer rows or larger passes need more", smaller)
    else:
        yield passed("step-memory", detail)
