"""What a run would be, before it starts: its parts placed as a run places them, on processes or weights that do not exist.

    expect     a run on this machine: steps, memory, time and disk, from its rows, its config and a tenth of a second of products
    simulate   any config on any number of ranks: the placement and one step of a run, rehearsed on two shallow models without weights

Only shapes are computed. What is counted in the rehearsal is handed to planning/, which knows no model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llamahome.config.load import LoadedConfig, with_values
from llamahome.config.optimizers import STATE_BYTES
from llamahome.config.schema import Config
from llamahome.data.report import DataReport
from llamahome.data.text.tokenizer_files import tokenizer_folder, tokenizer_source
from llamahome.data.text.tokens import open_tokenizer
from llamahome.data_limits import prepare_fitted, warn_of_length
from llamahome.distributed.world import World, open_world
from llamahome.errors import ConfigError, Problem
from llamahome.model.adapter import trained_rows
from llamahome.model.adapter_coverage import coverage_lines
from llamahome.model.backends.backend import Backend
from llamahome.model.backends.choose import choose_backend, planned_backend
from llamahome.model.load import CausalLM, find_model
from llamahome.model.lora import add_lora
from llamahome.model.place import LARGEST_SHARE, ChosenStrategy, choose_strategy, weight_bytes
from llamahome.model.precision import LowPrecision, Precision, choose_precision
from llamahome.model.quantize import BYTES, sizes_of
from llamahome.model.skeleton import count_weights, read_shape, require_layers, require_packed, skeleton
from llamahome.model.targets import copied_bytes
from llamahome.monitoring.throughput import measured_peak_flops
from llamahome.planning.dry_run import dry_run_step
from llamahome.planning.forecast import STRATEGIES, Cluster, Forecast, Strategy, Work, forecast, layout_of, remedy
from llamahome.planning.hardware import Device
from llamahome.planning.memory import ShardLayout, quantized_numbers
from llamahome.planning.shapes import CONFIGS, LayerShape, ModelShape
from llamahome.planning.streamed import plan_streamed
from llamahome.planning.traffic import Collective, extended
from llamahome.resolve import resolve_amount, too_short_to_compile, with_resolved
from llamahome.starting_adapter import with_adapter
from llamahome.training.learner import free_bytes
from llamahome.training.run import Plan, make_plan

_DEPTHS = (2, 3)
"""Layers of the models that are placed: with one more layer everything that a layer brings comes once more."""
_ALIKE: dict[str, Any] = {"layers": [], "rank_pattern": {}, "alpha_pattern": {}}
"""Adapters that differ between layers are planned as if all layers had those of lora.rank."""
_REACHED = 0.5
"""Share of the measured rate of one large product that a step reaches. measured: 635 tokens/s of LoRA on the starter, 0.34 TFLOP/s, beside
0.6 for the product (docs/log.md)."""


@dataclass(frozen=True)
class Simulation:
    """What was found for every strategy, and which one a run would take."""

    shape: ModelShape
    cluster: Cluster
    work: Work
    forecasts: dict[Strategy, Forecast]
    remedies: dict[Strategy, str | None]
    """For a strategy that does not fit: settings with which it does."""
    chosen: Strategy
    """By the rule of a run, which looks at weights and memory alone: it need not fit."""
    reason: str


def simulate(
    loaded: LoadedConfig, cluster: Cluster, *, passes: int, target_share: float, say: Callable[[str], None] = lambda line: None
) -> Simulation:
    """Place the configured model on the ranks of `cluster` and predict a step of `passes` full micro-batches on each of them.

    Raises ConfigError: an unknown model, or one whose layers are not alike.
    """
    if loaded.config.training.mixed_precision == "auto":  # the device is not here to be probed
        loaded = with_values(loaded, {"training.mixed_precision": "bf16"}, origin=f"simulated {cluster.device.name}")
    config = loaded.config
    precision = choose_precision(config, LowPrecision(True, True, f"simulated {cluster.device.name}"))
    backend = planned_backend(precision)
    read = require_layers(read_shape(config.model.name, CONFIGS), config.model.name)
    require_packed(read, say=say)
    layers = int(read.get_text_config().num_hidden_layers)
    wished = config.training.micro_batch_tokens
    tokens = backend.micro_batch_tokens if wished == "auto" else wished
    shape, kept = measure(config, backend, read, layers, tokens)
    length = min(config.data.max_length, tokens)
    wanted = config.training.gradient_checkpointing
    tile = backend.tile_bytes(int(read.get_text_config().vocab_size))
    work = Work(tokens, passes, length, target_share, kept, None if wanted == "auto" else wanted, LARGEST_SHARE, tile)
    apart, stored, computed = config.training.method == "lora", precision.storage.itemsize, precision.compute.itemsize
    forecasts: dict[Strategy, Forecast] = {}
    kind = config.model.quantization
    for strategy in _possible(cluster, quantized=kind is not None):
        layout = layout_of(strategy, cluster, stored=stored, computed=computed, apart=apart)
        layout = replace(layout, packed=None if kind is None else BYTES[kind])
        counted = _counted(config, precision, read, layers, strategy=strategy, cluster=cluster, passes=passes)
        forecasts[strategy] = forecast(strategy, shape, layout, cluster, work=work, counted=counted)
    remedies = {
        name: None if found.fits else remedy(name, shape, cluster, layout=found.layout, work=work) for name, found in forecasts.items()
    }
    chosen = _choose(config, precision, shape, cluster)
    return Simulation(shape, cluster, work, forecasts, remedies, chosen.strategy, chosen.reason)


def _choose(config: Config, precision: Precision, shape: ModelShape, cluster: Cluster) -> ChosenStrategy:
    """As a run does that finds the whole memory of its devices free."""
    method = config.training.method
    if config.model.quantization is not None:
        return ChosenStrategy("replicate", "quantised weights are kept whole on every process")
    loaded = shape.weights if method == "full" else shape.weights - shape.trained
    needed = weight_bytes(loaded, method=method, storage=precision.storage, optimizer=config.training.optimizer)
    world = World(0, cluster.ranks, 0, torch.device("cpu"), min(cluster.per_node, cluster.ranks))
    return choose_strategy(config.distributed.strategy, method=method, needed=needed, free=cluster.device.memory_bytes, world=world)


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
    remedy: str | None
    seconds: float
    """Of all steps; evaluations, checkpoints and the loading of the model come on top."""
    checkpoint_bytes: int
    copy_bytes: int
    """Of memory, for the copy that a checkpoint is written from; not made where it would be tight, so no part of what has to fit."""
    disk_bytes: int
    """All checkpoints that are kept at a time, one in the making, and the final model."""
    free_bytes: int
    """Memory that is free for runs now."""


def estimate(data_path: str | Sequence[str], loaded: LoadedConfig, *, say: Callable[[str], None]) -> Estimate:
    """Tokenize `data_path` as a run would, and plan its steps on one process here. Raises what preparing a run raises."""
    loaded, adapter = with_adapter(loaded, say=say)
    config = loaded.config
    with open_world(config.distributed, say=say, processor=config.model.backend == "cpu") as world:
        base = find_model(config.model.name, revision=config.model.revision, say=say)
        tokenizer = open_tokenizer(tokenizer_source(tokenizer_folder(base, adapter), config.model, trains=True))
        embedding_rows = trained_rows(adapter) if adapter is not None else 0
        loaded, prepared = prepare_fitted(loaded, data_path, base, tokenizer, rows=embedding_rows, say=say)
        prepared.close()
        longest = prepared.report.longest_tokens
        warn_of_length(loaded, base, longest, warn=lambda message, consequence: say(f"warning: {message}: {consequence}"))
        counted = with_resolved(loaded, resolve_amount(loaded.config.training, prepared, processes=world.size, say=say))
        plan = make_plan(counted.config.training, prepared.order.epoch_rows)
        backend = choose_backend(config, world.device)
        tokens_ahead = plan.rows_ahead * prepared.report.tokens_per_row
        short = too_short_to_compile(config.training, base, backend, world, tokens=tokens_ahead, say=say)
        config, precision = with_resolved(counted, short).config, backend.precision
        device = _this_machine(world, backend)
        wished = config.training.micro_batch_tokens
        most = backend.micro_batch_tokens if wished == "auto" else wished
    report, keep = prepared.report, config.checkpoint
    rows = min(int(config.training.batch_size), plan.positions)  # fewer rows than a step may hold
    per_step = report.tokens_per_row * rows
    passes = max(1, math.ceil(per_step / most))
    read = require_layers(read_shape(str(base), CONFIGS), config.model.name)
    require_packed(read, say=say)
    # A step must fit when its passes are as full as they may be, and as long as the longest row.
    fullest = max(most, config.data.max_length)
    shape, kept = measure(config, backend, read, int(read.get_text_config().num_hidden_layers), fullest)
    full = _full_pass(config, backend.tile_bytes(int(read.get_text_config().vocab_size)), report, tokens=fullest, kept=kept)
    here, apart = Cluster(device, 1, 1), config.training.method == "lora"
    layout = _layout_here(config, base, shape, precision, say=say)
    worst = forecast("replicate", shape, layout, here, work=full)
    usual = replace(
        full, tokens=max(1, math.ceil(per_step / passes)), passes=passes, length=round(report.mean_tokens), recomputes=worst.recomputes
    )
    step = replace(forecast("replicate", shape, layout, here, work=usual), memory=worst.memory, fits=worst.fits)
    streamed = plan_streamed(
        step, shape, base, config=config, backend=backend, report=report, kept=kept / fullest, free=device.memory_bytes
    )
    step = step if streamed is None else streamed.step
    checkpoint = (saved := round((4 + shape.state_bytes) * shape.trained)) + 8 * 2**20
    return Estimate(
        report=report,
        plan=plan,
        batch_size=int(config.training.batch_size),
        precision=precision,
        tokens_per_step=per_step,
        shape=shape,
        adapters=coverage_lines(_prepared(config, precision, read, shape.layers)) if apart else [],
        step=step,
        streamed=[] if streamed is None else streamed.lines,
        remedy=None if step.fits else remedy("replicate", shape, here, layout=layout, work=full),
        seconds=step.seconds * plan.positions / rows,
        checkpoint_bytes=checkpoint,
        copy_bytes=saved if keep.async_ else 0,
        disk_bytes=checkpoint * (keep.keep_last + keep.keep_best + 2 * len(keep.keep_ages) + 1) + 4 * shape.trained,
        free_bytes=device.memory_bytes,
    )


def _full_pass(config: Config, tile_bytes: int, report: DataReport, *, tokens: int, kept: int) -> Work:
    """One pass of `tokens` that keeps `kept` bytes."""
    wanted, share = config.training.gradient_checkpointing, report.targets / max(1, report.tokens)
    return Work(tokens, 1, config.data.max_length, share, kept, None if wanted == "auto" else wanted, LARGEST_SHARE, tile_bytes)


def _layout_here(config: Config, base: Path, shape: ModelShape, precision: Precision, *, say: Callable[[str], None]) -> ShardLayout:
    """Of one process that holds all weights."""
    itemsizes, apart = (precision.storage.itemsize, precision.compute.itemsize), config.training.method == "lora"
    return ShardLayout(1, 1, *itemsizes, apart, packed=_packed_bytes(config, base, shape, precision, say=say))


def _packed_bytes(config: Config, base: Path, shape: ModelShape, precision: Precision, *, say: Callable[[str], None]) -> float | None:
    """Bytes per number of the frozen linear layers with model.quantization, those included that stay as they are; None without it."""
    if (kind := config.model.quantization) is None:
        return None
    sizes, numbers = sizes_of(base, kind), quantized_numbers(shape)
    say(sizes.line(kind))
    return (sizes.nbytes + (numbers - sizes.numbers) * precision.storage.itemsize) / numbers


def _this_machine(world: World, backend: Backend) -> Device:
    """The device of this process, its rate measured."""
    rate = measured_peak_flops(world.device, backend.precision.compute)
    return Device(world.device.type, rate / 1e12, _REACHED, free_bytes(backend, world), backend.memory_gbps, 1.0, 1.0, 1)


def _possible(cluster: Cluster, *, quantized: bool) -> list[Strategy]:
    if cluster.ranks == 1 or quantized:
        return ["replicate"]
    return [name for name in STRATEGIES if name != "hybrid" or 1 < cluster.per_node < cluster.ranks]


def _prepared(config: Config, precision: Precision, read: Any, layers: int) -> CausalLM:
    """A model of `layers` without weights, with what is trained on it."""
    model = skeleton(read, layers=layers, dtype=precision.storage)
    if config.training.method == "lora":
        add_lora(model, config.lora, base=config.model.name, seed=config.training.seed, lean=not precision.autocast)
    return model


def measure(config: Config, backend: Backend, read: Any, layers: int, tokens: int) -> tuple[ModelShape, int]:
    """Weights of a layer and of the rest, and what a pass keeps for its backward pass, from models of two depths and of all layers."""
    precision = backend.precision
    alike = config.model_copy(update={"lora": config.lora.model_copy(update=_ALIKE)})
    few, many = (_prepared(alike, precision, read, depth) for depth in _DEPTHS)
    heads = few.get_output_embeddings().weight, many.get_output_embeddings().weight
    first, second = count_weights(few, heads[0]), count_weights(many, heads[1])
    layer = {key: (second[key] - first[key]) // (_DEPTHS[1] - _DEPTHS[0]) for key in first}
    rest = {key: first[key] - _DEPTHS[0] * layer[key] for key in first}
    text = read.get_text_config()
    heads_width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    shape = ModelShape(
        name=config.model.name,
        layers=layers,
        layer=LayerShape(**layer),
        rest=LayerShape(**rest),
        hidden=text.hidden_size,
        attention=heads_width,
        head=heads[0].numel(),
        head_trained=heads[0].requires_grad,
        state_bytes=STATE_BYTES[config.training.optimizer],
    )
    whole = skeleton(read, layers=layers, dtype=precision.storage)
    if sum(each.numel() for each in whole.parameters()) != shape.weights - (shape.trained if shape.layer.frozen else 0):
        message = f"the {layers} layers of {config.model.name} are not alike, so they cannot be planned from a few of them"
        raise ConfigError(Problem(code="model.unplannable", message=message, where="model.name", hint="--model llama-3-8b"))
    longest = min(config.data.max_length, tokens)
    compiled = config.training.compile is not False
    copied = copied_bytes(whole, config.lora.target_modules) if config.training.method == "lora" else 0
    return shape, copied + backend.kept_bytes(config, whole, tokens, longest=longest, compiled=compiled)


def _counted(
    config: Config, precision: Precision, read: Any, layers: int, *, strategy: Strategy, cluster: Cluster, passes: int
) -> list[Collective]:
    """The exchanges of a step of the whole model."""
    if cluster.ranks == 1:
        return []

    def step(depth: int) -> list[Collective]:
        once = dry_run_step(_prepared(config, precision, read, depth), precision, cluster, strategy=strategy, passes=min(passes, 2))
        return once.first_pass * (passes - 1) + once.last_pass

    few, many = step(_DEPTHS[0]), step(_DEPTHS[1])
    try:
        return extended(few, many, depths=_DEPTHS, layers=layers)
    except ValueError:  # buckets of gradients that hold parts of several layers
        return step(layers)
