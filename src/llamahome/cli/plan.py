"""plan: the steps, memory, time and disk of a run on this machine, or of a step on a simulated cluster; imports nothing heavy."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from llamahome.cli import options
from llamahome.rundir import RAW_DATA

if TYPE_CHECKING:
    from llamahome.config.load import LoadedConfig
    from llamahome.planning.estimate import Estimate
    from llamahome.planning.forecast import Cluster, Forecast
    from llamahome.planning.hardware import Device
    from llamahome.planning.simulate import Simulation

_GB = 1e9
_MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "buffers")
_SMALLEST_PART_SHOWN = 2**20
"""Bytes."""


@click.command(
    epilog=options.examples(
        "llamahome plan data/training/raw",
        "llamahome plan --simulate --model llama-3-8b --world-size 1024",
        "llamahome plan --simulate --model llama-3-70b --method full --world-size 256 --device h200 --json",
    )
)
@click.argument("data_path", nargs=-1, callback=options.not_options, help="Rows of the run to plan, as for train.")
@click.option("--simulate", is_flag=True, help="Plan for ranks that are not here, from the model's config alone.")
@options.model
@options.from_adapter
@options.course
@options.assignments
@click.option("--device", default="h100", help="h100, h200 or a100, with the figures of its data sheet.")
@click.option("--device-tflops", type=float, help="Peak of its bfloat16 products, 10^12 a second.")
@click.option("--mfu", type=float, help="Share of that peak that a step reaches while it computes.")
@click.option("--device-memory", help="Like '80 GB'.")
@click.option("--inside-gbps", type=float, help="Usable rate inside a machine, 10^9 bits a second.")
@click.option("--link-gbps", type=float, help="Usable rate of a rank to other machines.")
@click.option("--micro-batches", type=click.IntRange(min=1), default=1, help="Passes of each rank in a step.")
@click.option("--target-share", type=click.FloatRange(0, 1), default=1.0, help="Share of the tokens that is learned.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@options.pass_overrides
def plan(
    overrides: options.Overrides,
    data_path: tuple[str, ...],
    simulate: bool,
    device: str,
    device_tflops: float | None,
    mfu: float | None,
    device_memory: str | None,
    inside_gbps: float | None,
    link_gbps: float | None,
    micro_batches: int,
    target_share: float,
    as_json: bool,
) -> None:
    """Show what a run needs and how long it takes: on this machine, or simulated on up to thousands of ranks."""
    from llamahome.cli.train import importing_torch

    _check_arguments(data_path, simulate)
    loaded = overrides.load()
    options.check_settings(loaded)
    options.show_warnings(loaded)
    if not simulate:
        _print_estimate(loaded, list(data_path), as_json)
        return
    figures = {"tflops": device_tflops, "mfu": mfu, "inside_gbps": inside_gbps, "between_gbps": link_gbps}
    cluster = _cluster(loaded, _device(device, device_memory, figures))
    with importing_torch():
        from llamahome.planning.simulate import simulate as simulate_ranks

    simulation = simulate_ranks(loaded, cluster, passes=micro_batches, target_share=target_share, say=options.note)
    print(json.dumps(_simulation_json(simulation)) if as_json else "\n".join(_simulation_lines(simulation)))


def _check_arguments(data_path: Sequence[str], simulate: bool) -> None:
    """Raise UsageError unless there are either rows to plan for, or ranks to simulate without rows."""
    from llamahome.errors import Problem, UsageError

    if simulate and data_path:
        message = f"--simulate plans full micro-batches and reads no rows: {data_path[0]} would be ignored"
        hint = f"llamahome plan {shlex.join(data_path)}, or --simulate without it"
    elif not simulate and not data_path:
        message = "there are no rows to plan a run for"
        hint = f"llamahome plan {RAW_DATA}, or llamahome plan --simulate --world-size 8"
    else:
        return
    raise UsageError(Problem(code="usage.plan-simulates", message=message, hint=hint))


def _print_estimate(loaded: "LoadedConfig", data_path: list[str], as_json: bool) -> None:
    """Plan a run on this machine."""
    from llamahome.cli.train import importing_torch
    from llamahome.data.files.locate import locate
    from llamahome.data.files.splits import to_train
    from llamahome.errors import Problem, UsageError

    size = loaded.config.distributed.world_size
    if size not in ("auto", 1) or loaded.config.distributed.most_nodes > 1:
        message = "a plan that reads rows is for one process"
        hint = f"llamahome plan --simulate --world-size {8 if size == 'auto' else size}"
        raise UsageError(Problem(code="usage.plan-simulates", message=message, where="distributed.world_size", hint=hint))
    locate(data_path, wanted=to_train(loaded.config.data))
    with importing_torch():
        from llamahome.planning import estimate

    result = estimate.estimate(data_path, loaded, say=options.note)
    print(json.dumps(_estimate_json(result)) if as_json else "\n".join(_estimate_lines(result)))


def _estimate_json(estimate: "Estimate") -> dict[str, Any]:
    return {
        "simulated": False,
        "rows": estimate.report.epoch_rows,
        "eval_examples": estimate.report.eval_examples,
        "tokens_per_step": estimate.tokens_per_step,
        "steps": estimate.plan.horizon,
        "batch_size": estimate.batch_size,
        "epochs": estimate.plan.positions / estimate.report.epoch_rows,
        "adapters": estimate.adapters,
        "longest_row_tokens": estimate.longest_row,
        "longest_row_tokens_otherwise": estimate.longest_row_otherwise,
        "step": _forecast_json(estimate.step, estimate.remedy),
        "streamed": estimate.streamed,
        "refusal": estimate.refusal.message if estimate.refusal else None,
        "seconds": estimate.seconds,
        "cut_short": estimate.cut_short,
        "rollout_seconds": estimate.rollout_seconds,
        "checkpoint_bytes": estimate.checkpoint_bytes,
        "copy_bytes": estimate.copy_bytes,
        "disk_bytes": estimate.disk_bytes,
    }


def _estimate_lines(estimate: "Estimate") -> Iterator[str]:
    from llamahome.units import many, show_bytes, show_count, show_seconds

    step, memory, horizon = estimate.step, estimate.step.memory, estimate.plan.horizon
    yield from estimate.report.lines()[1:]
    trained = f"{show_count(estimate.shape.trained)} of {show_count(estimate.shape.weights)} weights are trained"
    yield f"model       {trained}, products in {estimate.precision.products}"
    yield from (f"            {line}" for line in estimate.adapters)
    rows = many(min(estimate.batch_size, estimate.plan.positions), "row")
    batch = f"{rows}, about {estimate.tokens_per_step:,.0f} tokens each"
    yield f"steps       {horizon:,} of {batch}; {estimate.plan.steps_per_epoch:,.1f} an epoch"
    parts = ", ".join(
        f"{part} {show_bytes(getattr(memory, part))}" for part in _MEMORY_PARTS if getattr(memory, part) >= _SMALLEST_PART_SHOWN
    )
    yield f"memory      up to {show_bytes(memory.total)} beside Python and its libraries: {parts}"
    offloaded = ", activation offloading on" if step.offloads else ""
    recomputed = f"gradient checkpointing {'on' if step.recomputes else 'off'}{offloaded}"
    yield f"            {'it fits' if step.fits else 'it does not fit'}; {recomputed}"
    yield from (f"            {line}" for line in estimate.streamed)
    if estimate.refusal is not None:
        yield f"            a run is refused: {estimate.refusal.message}; {estimate.refusal.hint}"
    elif not step.fits:
        yield f"            it would with {estimate.remedy}" if estimate.remedy else "            no setting of this machine makes it fit"
    yield f"            {_longest_row(estimate.longest_row, estimate.longest_row_otherwise)}"
    if estimate.copy_bytes:
        yield f"            {show_bytes(estimate.copy_bytes)} more to write checkpoints from, if a quarter of the free memory holds it"
    yield f"time        about {show_seconds(estimate.seconds)}, {step.tokens_per_s:,.0f} tokens/s, without evaluations and saving"
    if estimate.cut_short is not None:
        yield f"            {estimate.cut_short}"
    if estimate.rollout_seconds:
        share = estimate.rollout_seconds / (step.seconds + estimate.rollout_seconds)
        yield f"            {share:.0%} of it to draw answers, if all have grpo.max_new_tokens; tokens/s are those of learning"
    yield f"disk        up to {show_bytes(estimate.disk_bytes)}; a checkpoint is {show_bytes(estimate.checkpoint_bytes)}"


def _longest_row(longest: int, otherwise: int | None) -> str:
    """`otherwise` is less where activation offloading may be used, and more where it is off."""
    fits = f"rows of up to {longest:,} tokens fit" if longest else "no row fits"
    if otherwise is None or otherwise == longest:
        return fits
    return f"{fits}, {otherwise:,} {'without activation offloading' if otherwise < longest else 'with training.activation_offloading=auto'}"


def _bad_choice(message: str, where: str, hint: str) -> Exception:
    from llamahome.errors import Problem, UsageError

    return UsageError(Problem(code="usage.bad-choice", message=message, where=where, hint=hint))


def _device(name: str, memory: str | None, figures: dict[str, Any]) -> "Device":
    """The device `name` with the figures that were typed in place of its own; raises UsageError."""
    from llamahome.planning.hardware import DEVICES
    from llamahome.units import parse_bytes

    if name not in DEVICES:
        raise _bad_choice(
            f"{name!r} is none of {', '.join(DEVICES)}", "--device", "--device h100, with --device-tflops and --device-memory"
        )
    device, typed = DEVICES[name], {key: value for key, value in figures.items() if value is not None}
    if memory is not None:
        try:
            typed["memory_bytes"] = parse_bytes(memory)
        except ValueError as error:
            raise _bad_choice(str(error), "--device-memory", "--device-memory '80 GB'") from error
    for key, value in typed.items():
        if not 0 < value < float("inf") or (key == "mfu" and value > 1):
            raise _bad_choice(f"{key} {value:g} is not possible", "plan", f"leave it out: {name} has {getattr(device, key):g}")
    return replace(device, **typed)


def _cluster(loaded: "LoadedConfig", device: "Device") -> "Cluster":
    """How the ranks are spread over machines; raises UsageError or ConfigError."""
    from llamahome.config.load import is_chosen
    from llamahome.errors import ConfigError, Problem
    from llamahome.planning.forecast import Cluster

    ranks, machines = loaded.config.distributed.world_size, loaded.config.distributed.most_nodes
    if ranks == "auto":
        raise _bad_choice("the number of processes is not known", "distributed.world_size", "--world-size 8")
    per_node = ranks // machines if is_chosen(loaded.origins["distributed.num_nodes"]) else min(ranks, device.per_node)
    if ranks % per_node:
        message = f"{ranks} processes cannot be shared out evenly over machines of {per_node}"
        hint = f"--world-size {ranks // per_node * per_node}, or --num-nodes"
        raise ConfigError(Problem(code="distributed.world-size-not-divisible", message=message, where="distributed.world_size", hint=hint))
    return Cluster(device, ranks, per_node)


def _simulation_json(simulation: "Simulation") -> dict[str, Any]:
    """Everything, under names that do not change."""
    work, cluster, shape = asdict(simulation.work), simulation.cluster, simulation.shape
    return {
        "simulated": True,
        "model": {"name": shape.name, "layers": shape.layers, "weights": shape.weights, "trained": shape.trained},
        "cluster": {"ranks": cluster.ranks, "per_node": cluster.per_node, "device": asdict(cluster.device)},
        "work": {"tokens": work["tokens"], "passes": work["passes"], "length": work["length"], "target_share": work["target_share"]},
        "strategies": {
            name: {"micro_batch_tokens": simulation.works[name].tokens, **_forecast_json(forecast, simulation.remedies[name])}
            for name, forecast in simulation.forecasts.items()
        },
        "chosen": simulation.chosen,
        "reason": simulation.reason,
    }


def _forecast_json(forecast: "Forecast", remedy: str | None) -> dict[str, Any]:
    return {
        "fits": forecast.fits,
        "remedy": remedy,
        "gradient_checkpointing": forecast.recomputes,
        "activation_offloading": forecast.offloads,
        "memory_bytes": asdict(forecast.memory) | {"total": forecast.memory.total},
        "exchanges": forecast.exchanges,
        "sent_bytes": forecast.sent_bytes,
        "sent_bytes_by_formula": forecast.sent_by_formula,
        "compute_seconds": forecast.compute_seconds,
        "exchange_seconds": forecast.exchange_seconds,
        "update_seconds": forecast.update_seconds,
        "seconds": forecast.seconds,
        "seconds_if_hidden": forecast.seconds_if_hidden,
        "tokens_per_s": forecast.tokens_per_s,
    }


def _simulation_lines(simulation: "Simulation") -> Iterator[str]:
    shape, cluster, device, work = simulation.shape, simulation.cluster, simulation.cluster.device, simulation.work
    machines = cluster.ranks // cluster.per_node
    trained = f"{shape.trained / 1e6:,.1f}M of them trained"
    yield f"simulated: {shape.name}, {shape.weights / _GB:,.2f}B weights in {shape.layers} layers, {trained}"
    yield f"{cluster.ranks:,} ranks on {machines:,} machine{'s' if machines > 1 else ''}: {device.name}, {device.memory_bytes / _GB:g} GB"
    yield f"  {device.tflops:g} TFLOP/s at {device.mfu:.0%}, {device.inside_gbps:g} Gb/s inside a machine, {device.between_gbps:g} between"
    yield f"each rank, each step: {work.passes:,} x {work.tokens:,} tokens in documents of {work.length:,}"
    yield ""
    yield f"{'GB per rank':<25}" + "".join(f"{name:>14}" for name in simulation.forecasts)
    for part in (*_MEMORY_PARTS, "total"):
        yield f"  {part:<23}" + "".join(f"{getattr(forecast.memory, part) / _GB:>14,.2f}" for forecast in simulation.forecasts.values())
    rows = {
        "fits": [("yes" if forecast.fits else "no") for forecast in simulation.forecasts.values()],
        "tokens a micro-batch": [f"{each.tokens:,}" for each in simulation.works.values()],
        "gradient checkpointing": [("yes" if forecast.recomputes else "no") for forecast in simulation.forecasts.values()],
        "activation offloading": [("yes" if forecast.offloads else "no") for forecast in simulation.forecasts.values()],
        "exchanges a step": [f"{sum(forecast.exchanges.values()):,}" for forecast in simulation.forecasts.values()],
        "GB sent a step": [f"{forecast.sent_bytes / _GB:,.3f}" for forecast in simulation.forecasts.values()],
        "seconds a step": [f"{forecast.seconds:,.3f}" for forecast in simulation.forecasts.values()],
        "  if exchanges hide": [f"{forecast.seconds_if_hidden:,.3f}" for forecast in simulation.forecasts.values()],
        "tokens/s per rank": [f"{forecast.tokens_per_s / cluster.ranks:,.0f}" for forecast in simulation.forecasts.values()],
        "tokens/s": [f"{forecast.tokens_per_s:,.0f}" for forecast in simulation.forecasts.values()],
    }
    for name, cells in rows.items():
        yield f"{name:<25}" + "".join(f"{cell:>14}" for cell in cells)
    yield ""
    for name, forecast in simulation.forecasts.items():
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in forecast.exchanges.items()) or "none"
        yield f"{name}: {kinds}"
        if not forecast.fits:
            remedy = simulation.remedies[name]
            yield f"  does not fit; it would with {remedy}" if remedy else "  does not fit, and no setting of this strategy makes it fit"
    yield f"distributed.strategy auto: {simulation.chosen} ({simulation.reason})"
