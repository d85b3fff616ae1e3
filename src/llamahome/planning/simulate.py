"""Any config on any number of ranks that are not here: its placement, and one step of a run on two shallow models without weights.

Only shapes are computed. What is counted in the step is extended to the depth of the model.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from llamahome.config.load import LoadedConfig, with_values
from llamahome.config.schema import Config
from llamahome.distributed.world import World
from llamahome.model.backends.choose import planned_backend
from llamahome.model.place import ChosenStrategy, choose_strategy, weight_bytes
from llamahome.model.precision import LowPrecision, Precision, choose_precision
from llamahome.model.quantized_copy import usual_bytes
from llamahome.model.skeleton import read_shape, require_layers, require_packed
from llamahome.planning.dry_run import dry_run_step
from llamahome.planning.forecast import STRATEGIES, Cluster, Forecast, Strategy, Work, forecast, layout_of, remedy
from llamahome.planning.measure import DEPTHS, differs, measure, prepared_model
from llamahome.planning.memory import ShardLayout, quantized_numbers
from llamahome.planning.passes import simulated_work
from llamahome.planning.shapes import CONFIGS, ModelShape
from llamahome.planning.traffic import Collective, extended


@dataclass(frozen=True)
class Simulation:
    """What was found for every strategy, and which one a run would take."""

    shape: ModelShape
    cluster: Cluster
    works: dict[Strategy, Work]
    forecasts: dict[Strategy, Forecast]
    remedies: dict[Strategy, str | None]
    """For a strategy that does not fit: settings with which it does."""
    chosen: Strategy
    """By the rule of a run, which looks at weights and memory alone: it need not fit."""
    reason: str

    @property
    def work(self) -> Work:
        """That of the chosen strategy; of the first one if the chosen one is none here (hybrid with one rank on each machine)."""
        return self.works.get(self.chosen) or next(iter(self.works.values()))


def simulate(
    loaded: LoadedConfig, cluster: Cluster, *, passes: int, target_share: float, say: Callable[[str], None] = lambda line: None
) -> Simulation:
    """Place the configured model on the ranks of `cluster` and predict a step of `passes` full micro-batches on each of them.

    Micro-batches have the size that a run chooses on devices whose whole memory is free.
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
    shape, activations = measure(config, backend, read, layers)
    works: dict[Strategy, Work] = {}
    forecasts: dict[Strategy, Forecast] = {}
    for strategy in _possible(cluster, quantized=config.model.quantization is not None):
        layout = _layout_there(config, precision, shape, cluster, strategy)
        counted = _counted(config, precision, read, layers, layout=layout, strategy=strategy, cluster=cluster, passes=passes)
        work = simulated_work(activations, shape, layout, cluster, passes=passes, target_share=target_share)
        works[strategy], forecasts[strategy] = work, forecast(strategy, shape, layout, cluster, work=work, counted=counted)
    remedies = {name: remedy(name, shape, cluster, layout=found.layout, work=works[name]) or None for name, found in forecasts.items()}
    chosen = _choose(config, precision, shape, cluster)
    return Simulation(shape, cluster, works, forecasts, remedies, chosen.strategy, chosen.reason)


def _layout_there(config: Config, precision: Precision, shape: ModelShape, cluster: Cluster, strategy: Strategy) -> ShardLayout:
    """How a run would lay out the weights with `strategy`."""
    kind, apart = config.model.quantization, config.training.method == "lora"
    layout = layout_of(strategy, cluster, stored=precision.storage.itemsize, computed=precision.compute.itemsize, apart=apart)
    as_set = config.model_copy(update={"distributed": config.distributed.model_copy(update={"strategy": strategy})})
    chosen = _choose(as_set, precision, shape, cluster)
    return replace(
        layout, packed=None if kind is None else usual_bytes(kind, quantized_numbers(shape)), sums_each_pass=chosen.sums_each_pass
    )


def _choose(config: Config, precision: Precision, shape: ModelShape, cluster: Cluster) -> ChosenStrategy:
    """As a run does that finds the whole memory of its devices free."""
    method = config.training.method
    if config.model.quantization is not None:
        return ChosenStrategy("replicate", "quantised weights are kept whole on every process")
    loaded = shape.weights if method == "full" else shape.weights - shape.trained
    needed = weight_bytes(loaded, method=method, storage=precision.storage, optimizer=config.training.optimizer)
    world = World(0, cluster.ranks, 0, torch.device("cpu"), min(cluster.per_node, cluster.ranks))
    return choose_strategy(config.distributed.strategy, method=method, needed=needed, free=cluster.device.memory_bytes, world=world)


def _possible(cluster: Cluster, *, quantized: bool) -> list[Strategy]:
    if cluster.ranks == 1 or quantized:
        return ["replicate"]
    return [name for name in STRATEGIES if name != "hybrid" or 1 < cluster.per_node < cluster.ranks]


def _counted(
    config: Config, precision: Precision, read: Any, layers: int, *, layout: ShardLayout, strategy: Strategy, cluster: Cluster, passes: int
) -> list[Collective]:
    """The exchanges of a step of the whole model."""
    if cluster.ranks == 1:
        return []

    def step(depth: int) -> list[Collective]:
        model, each = prepared_model(config, precision, read, depth), layout.sums_each_pass
        once = dry_run_step(model, precision, cluster, strategy=strategy, passes=min(passes, 2), sums_each_pass=each)
        return once.first_pass * (passes - 1) + once.last_pass

    if differs(config):
        return step(layers)
    try:
        return extended(*map(step, DEPTHS), depths=DEPTHS, layers=layers)
    except ValueError:  # buckets of gradients that hold parts of several layers
        return step(layers)
