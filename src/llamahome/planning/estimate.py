"""What a run on this machine would be, before it starts: steps, memory, time and disk, from its rows, its config and a tenth of a second
of products.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from llamahome.config.load import LoadedConfig
from llamahome.config.schema import Config
from llamahome.conversation import base_of_run
from llamahome.data.report import DataReport
from llamahome.distributed.world import World, open_world
from llamahome.errors import Problem
from llamahome.model.backends.backend import Backend
from llamahome.model.backends.choose import choose_backend
from llamahome.model.precision import Precision
from llamahome.model.quantized_copy import expected_sizes
from llamahome.model.skeleton import read_shape, require_layers, require_packed
from llamahome.model.vocabulary import NewRows
from llamahome.monitoring.throughput import measured_peak_flops
from llamahome.pass_memory import documents_of_row
from llamahome.pipeline import check_run
from llamahome.planning.forecast import Cluster, Forecast, forecast, layout_of, remedy
from llamahome.planning.hardware import Device
from llamahome.planning.measure import adapters_of, longest_rows, measure
from llamahome.planning.memory import ShardLayout, quantized_numbers
from llamahome.planning.passes import LOADED_LATER, free_for_passes, fullest_pass, pass_tokens
from llamahome.planning.rollout import Rollout, rollout_of
from llamahome.planning.shapes import CONFIGS, ModelShape
from llamahome.planning.streamed import plan_base
from llamahome.planning.time_limit import within_limit
from llamahome.resolve import PASSES_PER_TOKEN, refuse_to_compile, resolve_amount, too_short_to_compile, with_resolved
from llamahome.run_rows import check_rows, new_rows, read_rows
from llamahome.starting_adapter import with_adapter
from llamahome.streamed import REACHED
from llamahome.training.loaded_model import free_bytes
from llamahome.training.run import Plan, make_plan


@dataclass(frozen=True)
class Estimate:
    """What a run on this machine would be."""

    report: DataReport
    plan: Plan
    batch_size: int
    precision: Precision
    tokens_per_step: float
    shape: ModelShape
    adapters: list[str]
    """What gets adapters and what does not, in lines; none without LoRA."""
    step: Forecast
    streamed: list[str]
    """What reading the base in every pass costs, in lines; none if it is held in memory."""
    refusal: Problem | None
    """Why a run would end before training, where the weights themselves do not fit."""
    remedy: str | None
    longest_row: int
    """Tokens of the longest row that fits, alone in its pass; 0 if none does."""
    longest_row_otherwise: int | None
    """The same without activation offloading, or with it if it is off; None if there is no place to move anything to."""
    seconds: float
    """Of all steps, at most training.max_time; evaluations, checkpoints and the loading of the model come on top."""
    cut_short: str | None
    """What it means that training.max_time ends the run before its last step; None if it does not."""
    rollout_seconds: float
    """Of a step, at most, for drawing answers, where the objective does."""
    checkpoint_bytes: int
    copy_bytes: int
    """Of memory, for the copy that a checkpoint is written from; not made where it would be tight, so no part of what has to fit."""
    disk_bytes: int
    """All checkpoints that are kept at a time, one in the making, and the final model."""
    free_bytes: int
    """Memory that is free for runs now."""


@dataclass(frozen=True)
class _Prepared:
    """What a run would begin with."""

    config: Config
    base: Path
    report: DataReport
    plan: Plan
    backend: Backend
    device: Device
    rows: NewRows
    """Of embedding and head, for tokens that the base does not know."""


def estimate(data_path: str | Sequence[str], loaded: LoadedConfig, *, say: Callable[[str], None]) -> Estimate:
    """Tokenize `data_path` as a run would, and plan its steps on one process here. Raises what preparing a run raises."""
    prepared = _prepare(data_path, loaded, say=say)
    config, base, report, backend, device = prepared.config, prepared.base, prepared.report, prepared.backend, prepared.device
    precision, plan = backend.precision, prepared.plan
    rows = min(int(config.training.batch_size), plan.positions)  # fewer rows than a step may hold
    drawn = rollout_of(config, report, rows)
    per_step = report.tokens_per_row * rows if drawn is None else drawn.tokens
    read = require_layers(read_shape(str(base), CONFIGS), config.model.name)
    require_packed(read, say=say)
    # A step must fit when its passes are as full as they may be, and as long as the longest row.
    shape, activations = measure(config, backend, read, int(read.get_text_config().num_hidden_layers))
    here = Cluster(device, 1, 1)
    layout = _layout_here(config, base, shape, precision, here, say=say)
    free = free_for_passes(shape, layout, device.memory_bytes)
    most = pass_tokens(activations, free, compiled=config.training.compile is not False)
    passes = max(1, math.ceil(per_step / most))
    share = report.answer_share if drawn is None else drawn.target_share
    fullest = max(most, documents_of_row(config) * config.data.max_length)
    full = fullest_pass(activations, tokens=fullest, share=share)
    worst = forecast("replicate", shape, layout, here, work=full)
    length = round(report.mean_tokens) if drawn is None else drawn.prompt_tokens + drawn.answer_tokens
    tokens = max(1, math.ceil(per_step / passes))
    usual = replace(full, tokens=tokens, passes=passes, length=length, recomputes=worst.recomputes, offloads=worst.offloads)
    step = replace(forecast("replicate", shape, layout, here, work=usual), memory=worst.memory, fits=worst.fits)
    base_plan = plan_base(step, shape, base, report=report, activations=activations, free=device.memory_bytes)
    rollout, step = _drawing_seconds(config, backend, drawn, step, base_plan.read_seconds), base_plan.step
    longest, otherwise = longest_rows(shape, layout, device, full, activations)
    if base_plan.longest_row is not None:
        longest, otherwise = base_plan.longest_row, None
    whole = (step.seconds + rollout) * plan.positions / rows
    seconds, cut_short = within_limit(config.training, horizon=plan.horizon, seconds=whole)
    saved, keep = round((4 + shape.state_bytes) * shape.trained) + 4 * shape.started, config.checkpoint
    return Estimate(
        report=report,
        plan=plan,
        batch_size=int(config.training.batch_size),
        precision=precision,
        tokens_per_step=per_step,
        shape=shape,
        adapters=adapters_of(config, precision, read, base, prepared.rows),
        step=step,
        streamed=base_plan.lines,
        refusal=base_plan.refusal,
        remedy=None if step.fits else remedy("replicate", shape, here, layout=layout, work=full),
        longest_row=longest,
        longest_row_otherwise=otherwise,
        seconds=seconds,
        cut_short=cut_short,
        rollout_seconds=rollout,
        checkpoint_bytes=(checkpoint := saved + 8 * 2**20),
        copy_bytes=saved if keep.async_ else 0,
        disk_bytes=checkpoint * (keep.keep_last + keep.keep_best + 2 * len(keep.keep_ages) + 1) + 4 * (shape.trained + shape.started),
        free_bytes=device.memory_bytes,
    )


def _prepare(data_path: str | Sequence[str], loaded: LoadedConfig, *, say: Callable[[str], None]) -> _Prepared:
    check_run(loaded)
    loaded, adapter = with_adapter(loaded, say=say)
    config = loaded.config
    with open_world(config.distributed, say=say, processor=config.model.backend == "cpu") as world:
        base = base_of_run(loaded, say=say)
        rows = read_rows(loaded, data_path, base, adapter, say=say)
        loaded, prepared, report = rows.fitted, rows.prepared, rows.prepared.report
        with closing(prepared):  # below, streamed rows cannot be read any more
            check_rows(rows, base, warn=lambda message, why: say(f"warning: {message}: {why}"))
            counted = with_resolved(loaded, resolve_amount(loaded.config.training, prepared, processes=world.size, say=say))
        plan = make_plan(counted.config.training, prepared.order.epoch_rows)
        refuse_to_compile(config.training, backend := choose_backend(config, world.device))
        short = too_short_to_compile(config.training, base, backend, world, tokens=plan.rows_ahead * report.tokens_per_row, say=say)
        added = new_rows(rows.tokenizer, config.model) if adapter is None else NewRows()
        return _Prepared(with_resolved(counted, short).config, base, report, plan, backend, _this_machine(world, backend), added)


def _layout_here(
    config: Config, base: Path, shape: ModelShape, precision: Precision, here: Cluster, *, say: Callable[[str], None]
) -> ShardLayout:
    """Whole weights on one process, packed if they are quantised."""
    stored, computed, apart = precision.storage.itemsize, precision.compute.itemsize, config.training.method == "lora"
    layout = layout_of("replicate", here, stored=stored, computed=computed, apart=apart)
    return replace(layout, packed=_packed_bytes(config, base, shape, precision, say=say))


def _drawing_seconds(config: Config, backend: Backend, drawn: Rollout | None, step: Forecast, read_seconds: float) -> float:
    """Seconds of a step for drawing its answers, from the rate of its passes, each of which reads for a while; 0 if none are drawn."""
    if drawn is None:
        return 0.0
    forward = step.compute_seconds / step.tokens / PASSES_PER_TOKEN[config.training.method]
    return drawn.pass_tokens(backend.pass_tokens_per_answer_token) * forward + drawn.batches * drawn.answer_tokens * read_seconds


def _packed_bytes(config: Config, base: Path, shape: ModelShape, precision: Precision, *, say: Callable[[str], None]) -> float | None:
    """Bytes per number of the frozen linear layers with model.quantization, all of them together; None without it."""
    if (kind := config.model.quantization) is None:
        return None
    sizes, numbers = expected_sizes(base, kind, say=say), quantized_numbers(shape)
    return (sizes.packed_bytes + (numbers - sizes.packed_numbers) * precision.storage.itemsize) / numbers


def _this_machine(world: World, backend: Backend) -> Device:
    """The device of this process, its rate measured."""
    rate = measured_peak_flops(world.device, backend.precision.compute)
    free = max(0, free_bytes(backend, world) - (LOADED_LATER if backend.free_bytes(1) is None else 0))
    return Device(world.device.type, rate / 1e12, REACHED, free, backend.memory_gbps, 1.0, 1.0, 1)
