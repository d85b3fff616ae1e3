"""plan: what a run would take here, or a step on ranks that are not here. Nothing heavy is imported at the top."""

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamahome.cli.train import Assignments, ConfigFiles, Epochs, EvalData, MaxSteps, Method, Model, NumNodes, WorldSize, flag_values
from llamahome.rundir import RAW_DATA

if TYPE_CHECKING:
    from llamahome.config.load import LoadedConfig
    from llamahome.outlook import Expected, Simulation
    from llamahome.planning.forecast import Cluster, Forecast

_GB = 1e9


def plan(
    data_path: Annotated[list[str] | None, typer.Argument(help="Rows of the run to plan, as for train.", metavar="[DATA_PATH]...")] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Plan for ranks that are not here, from the model's config alone.")] = False,
    model: Model = None,
    world_size: WorldSize = None,
    num_nodes: NumNodes = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    method: Method = None,
    eval_data: EvalData = None,
    config: ConfigFiles = None,
    assignments: Assignments = None,
    device: Annotated[str, typer.Option("--device", help="h100, h200 or a100: figures of the data sheet.")] = "h100",
    tflops: Annotated[float | None, typer.Option("--device-tflops", help="Peak of its bfloat16 products, 10^12 a second.")] = None,
    mfu: Annotated[float | None, typer.Option("--mfu", help="Share of that peak that a step reaches while it computes.")] = None,
    memory: Annotated[str | None, typer.Option("--device-memory", help="Like '80 GB'.")] = None,
    inside: Annotated[float | None, typer.Option("--inside-gbps", help="Usable rate inside a machine, 10^9 bits a second.")] = None,
    between: Annotated[float | None, typer.Option("--link-gbps", help="Usable rate of a rank to other machines.")] = None,
    micro_batches: Annotated[int, typer.Option("--micro-batches", min=1, help="Passes of each rank in a step.")] = 1,
    target_share: Annotated[float, typer.Option("--target-share", min=0.0, max=1.0, help="Share of the tokens that is learned.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What a run would need and take: on this machine, or on up to thousands of ranks before any of them is paid for.

    Examples:
      llamahome plan data/training/raw
      llamahome plan --simulate --model llama-3-8b --world-size 1024
      llamahome plan --simulate --model llama-3-70b --method full --world-size 256 --device h200 --json
    """
    from llamahome.config.load import load_config

    _refuse_words(data_path or [], simulate)
    work = {"--epochs": epochs, "--max-steps": max_steps, "--method": method, "--eval-data": eval_data}
    typed = {"--model": model, "--world-size": world_size, "--num-nodes": num_nodes} | work
    loaded = load_config(config or [], flags=flag_values(typed), assignments=assignments or [])
    figures = {"tflops": tflops, "mfu": mfu, "memory": memory, "inside_gbps": inside, "between_gbps": between}
    if not simulate:
        _show_expected(loaded, data_path or [], as_json)
        return
    cluster = _cluster(loaded, device, figures)

    from llamahome.cli.train import importing_torch

    with importing_torch():
        from llamahome import outlook

    found = outlook.simulate(loaded, cluster, passes=micro_batches, target_share=target_share)
    print(json.dumps(_told(found)) if as_json else "\n".join(_lines(found)))


def _refuse_words(data_path: list[str], simulate: bool) -> None:
    """UsageError unless there are rows to plan for, or ranks without rows."""
    from llamahome.errors import Problem, UsageError

    if simulate and data_path:
        message = f"--simulate plans full micro-batches and reads no rows: {data_path[0]} would be ignored"
        raise UsageError(
            Problem(code="usage.plan-simulates", message=message, hint=f"llamahome plan {shlex.join(data_path)}, or --simulate without it")
        )
    if not simulate and not data_path:
        message = "there are no rows to plan a run for"
        raise UsageError(
            Problem(
                code="usage.plan-simulates", message=message, hint=f"llamahome plan {RAW_DATA}, or llamahome plan --simulate --world-size 8"
            )
        )


def _show_expected(loaded: "LoadedConfig", data_path: list[str], as_json: bool) -> None:
    """Plan a run on this machine."""
    from llamahome.cli.train import importing_torch
    from llamahome.config.check import check_config
    from llamahome.data.files.locate import locate
    from llamahome.data.files.splits import to_train
    from llamahome.errors import ConfigError, Problem, UsageError

    if problems := check_config(loaded.config, loaded.origins):
        raise ConfigError(problems)
    if loaded.config.distributed.world_size not in ("auto", 1) or loaded.config.distributed.most_nodes > 1:
        message = "the plan of rows is that of one process"
        size = loaded.config.distributed.world_size
        hint = f"llamahome plan --simulate --world-size {8 if size == 'auto' else size}"
        raise UsageError(Problem(code="usage.plan-simulates", message=message, where="distributed.world_size", hint=hint))
    locate(data_path, wanted=to_train(loaded.config.data))
    with importing_torch():
        from llamahome import outlook

    found = outlook.expect(data_path, loaded, say=lambda line: print(line, file=sys.stderr))
    rows = min(found.batch_size, found.plan.positions)
    print(json.dumps(_expected(found)) if as_json else "\n".join(_expected_lines(found, rows)))


def _expected(found: "Expected") -> dict[str, Any]:
    return {
        "simulated": False,
        "rows": found.report.epoch_rows,
        "eval_examples": found.report.eval_examples,
        "tokens_per_step": found.tokens_per_step,
        "steps": found.plan.horizon,
        "batch_size": found.batch_size,
        "epochs": found.plan.positions / found.report.epoch_rows,
        "adapters": found.adapters,
        "step": _figures(found.step, found.remedy),
        "seconds": found.seconds,
        "checkpoint_bytes": found.checkpoint_bytes,
        "copy_bytes": found.copy_bytes,
        "disk_bytes": found.disk_bytes,
    }


def _expected_lines(found: "Expected", rows: int) -> Iterator[str]:
    from llamahome.units import many, show_bytes, show_count, show_seconds

    step, memory, plan_ = found.step, found.step.memory, found.plan
    yield from found.report.lines()[1:]
    trained = f"{show_count(found.shape.trained)} of {show_count(found.shape.weights)} weights are trained"
    yield f"model       {trained}, products in {found.precision.name if found.precision.name == 'bf16' else 'float32'}"
    yield from (f"            {line}" for line in found.adapters)
    each = f"{many(rows, 'row')}, about {found.tokens_per_step:,.0f} tokens each"
    yield f"steps       {plan_.horizon:,} of {each}; {plan_.steps_per_epoch:,.1f} an epoch"
    parts = ("weights", "gradients", "optimizer", "activations", "loss", "buffers")
    told = ", ".join(f"{part} {show_bytes(getattr(memory, part))}" for part in parts if getattr(memory, part) >= 2**20)
    yield f"memory      up to {show_bytes(memory.total)} beside Python and its libraries: {told}"
    yield f"            {'it fits' if step.fits else 'it does not fit'}; gradient checkpointing {'on' if step.recomputes else 'off'}"
    if not step.fits:
        yield f"            it would with {found.remedy}" if found.remedy else "            no setting of this machine makes it fit"
    if found.copy_bytes:
        yield f"            {show_bytes(found.copy_bytes)} more to write checkpoints from, if a quarter of what is free holds it"
    yield f"time        about {show_seconds(found.seconds)}, {step.tokens_per_s:,.0f} tokens/s; evaluations and saving come on top"
    yield f"disk        up to {show_bytes(found.disk_bytes)}; a checkpoint is {show_bytes(found.checkpoint_bytes)}"


def _cluster(loaded: "LoadedConfig", name: str, figures: dict[str, Any]) -> "Cluster":
    """The device with what was typed instead of its figures, and how the ranks sit on machines. Raises UsageError or ConfigError."""
    from llamahome.config.check import check_config
    from llamahome.config.load import is_chosen
    from llamahome.errors import ConfigError, Problem, UsageError
    from llamahome.planning.forecast import Cluster
    from llamahome.planning.hardware import DEVICES
    from llamahome.units import parse_bytes

    if problems := check_config(loaded.config, loaded.origins):
        raise ConfigError(problems)

    def refuse(message: str, where: str, hint: str) -> UsageError:
        return UsageError(Problem(code="usage.bad-choice", message=message, where=where, hint=hint))

    if name not in DEVICES:
        raise refuse(f"{name!r} is none of {', '.join(DEVICES)}", "--device", "--device h100, with --device-tflops and --device-memory")
    typed = {key: value for key, value in figures.items() if value is not None}
    try:
        if "memory" in typed:
            typed["memory_bytes"] = parse_bytes(typed.pop("memory"))
    except ValueError as error:
        raise refuse(str(error), "--device-memory", "--device-memory '80 GB'") from error
    for key, value in typed.items():
        if not 0 < value < float("inf") or (key == "mfu" and value > 1):
            raise refuse(f"{key} {value:g} is not possible", "plan", f"leave it out: {name} has {getattr(DEVICES[name], key):g}")
    chosen = replace(DEVICES[name], **typed)
    ranks, machines = loaded.config.distributed.world_size, loaded.config.distributed.most_nodes
    if ranks == "auto":
        raise refuse("the number of processes is not known", "distributed.world_size", "--world-size 8")
    per_node = ranks // machines if is_chosen(loaded.origins["distributed.num_nodes"]) else min(ranks, chosen.per_node)
    if ranks % per_node:
        message = f"{ranks} processes cannot be shared out evenly over machines of {per_node}"
        hint = f"--world-size {ranks // per_node * per_node}, or --num-nodes"
        raise ConfigError(Problem(code="distributed.world-size-not-divisible", message=message, where="distributed.world_size", hint=hint))
    return Cluster(chosen, ranks, per_node)


def _told(found: "Simulation") -> dict[str, Any]:
    """Everything, under names that stay."""
    work, cluster = asdict(found.work), found.cluster
    return {
        "simulated": True,
        "model": {"name": found.shape.name, "layers": found.shape.layers, "weights": found.shape.weights, "trained": found.shape.trained},
        "cluster": {"ranks": cluster.ranks, "per_node": cluster.per_node, "device": asdict(cluster.device)},
        "work": {"tokens": work["tokens"], "passes": work["passes"], "length": work["length"], "target_share": work["target_share"]},
        "strategies": {name: _figures(each, found.remedies[name]) for name, each in found.forecasts.items()},
        "chosen": found.chosen,
        "reason": found.reason,
    }


def _figures(each: "Forecast", remedy: str | None) -> dict[str, Any]:
    return {
        "fits": each.fits,
        "remedy": remedy,
        "gradient_checkpointing": each.recomputes,
        "memory_bytes": asdict(each.memory) | {"total": each.memory.total},
        "exchanges": each.exchanges,
        "sent_bytes": each.sent_bytes,
        "sent_bytes_by_formula": each.sent_by_formula,
        "compute_seconds": each.compute_seconds,
        "exchange_seconds": each.exchange_seconds,
        "update_seconds": each.update_seconds,
        "seconds": each.seconds,
        "seconds_if_hidden": each.seconds_if_hidden,
        "tokens_per_s": each.tokens_per_s,
    }


def _lines(found: "Simulation") -> Iterator[str]:
    shape, cluster, work, device = found.shape, found.cluster, found.work, found.cluster.device
    machines = cluster.ranks // cluster.per_node
    trained = f"{shape.trained / 1e6:,.1f}M of them trained"
    yield f"simulated: {shape.name}, {shape.weights / _GB:,.2f}B weights in {shape.layers} layers, {trained}"
    yield f"{cluster.ranks:,} ranks on {machines:,} machine{'s' if machines > 1 else ''}: {device.name}, {device.memory_bytes / _GB:g} GB"
    yield f"  {device.tflops:g} TFLOP/s at {device.mfu:.0%}, {device.inside_gbps:g} Gb/s inside a machine, {device.between_gbps:g} between"
    yield f"each rank, each step: {work.passes:,} x {work.tokens:,} tokens in documents of {work.length:,}"
    yield ""
    yield f"{'GB per rank':<25}" + "".join(f"{name:>14}" for name in found.forecasts)
    for part in ("weights", "gradients", "optimizer", "activations", "loss", "buffers", "total"):
        yield f"  {part:<23}" + "".join(f"{getattr(each.memory, part) / _GB:>14,.2f}" for each in found.forecasts.values())
    rows = {
        "fits": [("yes" if each.fits else "no") for each in found.forecasts.values()],
        "gradient checkpointing": [("yes" if each.recomputes else "no") for each in found.forecasts.values()],
        "exchanges a step": [f"{sum(each.exchanges.values()):,}" for each in found.forecasts.values()],
        "GB sent a step": [f"{each.sent_bytes / _GB:,.3f}" for each in found.forecasts.values()],
        "seconds a step": [f"{each.seconds:,.3f}" for each in found.forecasts.values()],
        "  if exchanges hide": [f"{each.seconds_if_hidden:,.3f}" for each in found.forecasts.values()],
        "tokens/s per rank": [f"{each.tokens_per_s / cluster.ranks:,.0f}" for each in found.forecasts.values()],
        "tokens/s": [f"{each.tokens_per_s:,.0f}" for each in found.forecasts.values()],
    }
    for name, cells in rows.items():
        yield f"{name:<25}" + "".join(f"{cell:>14}" for cell in cells)
    yield ""
    for name, each in found.forecasts.items():
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in each.exchanges.items()) or "none"
        yield f"{name}: {kinds}"
        if not each.fits:
            remedy = found.remedies[name]
            yield f"  does not fit; it would with {remedy}" if remedy else "  does not fit, and no setting of this strategy makes it fit"
    yield f"distributed.strategy auto: {found.chosen} ({found.reason})"
