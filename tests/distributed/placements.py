"""Tasks of the worker processes of test_placements.py: the same steps in every placement that the number of processes allows."""

import dataclasses
from pathlib import Path

import torch
from tests.support.models import FP32, backend_named, examples_of
from tests.support.runs import table_of

from llamahome.config.schema import LoraConfig
from llamahome.data.steps.loader import Loader
from llamahome.data.steps.mixture import plain_order
from llamahome.distributed.reducer import OverlappedReducer
from llamahome.distributed.world import World
from llamahome.model.load import load_model
from llamahome.model.lora import add_lora
from llamahome.model.objective import Objective
from llamahome.model.place import place
from llamahome.model.shard import Placement, replicated, sharded
from llamahome.model.shard_load import make_mesh
from llamahome.monitoring.throughput import PartClock
from llamahome.training.evaluate import evaluate
from llamahome.training.optimizer import make_optimizer, set_learning_rate
from llamahome.training.spikes import Limits
from llamahome.training.step import train_step

ROWS = table_of(examples_of((31, 18, 18, 9, 40, 2, 1, 13, 25, 17, 5), seed=1))
BATCH = 4


def make_placed(world: World, base: str, method: str, strategy: str):
    """A model in its placement. Hybrid uses two machines (three if there are three processes)."""
    strategy, _, how = strategy.partition(" ")
    machines = 3 if world.size == 3 else 2
    here = dataclasses.replace(world, local_size=world.size // machines) if strategy == "hybrid" else world
    mesh = make_mesh(here, strategy) if how == "by-rows" else None
    model = load_model(Path(base), dtype=torch.float32, device=world.device, mesh=mesh).eval()
    if method == "lora":
        add_lora(model, LoraConfig(rank=4), base="tiny", seed=0, lean=True)
    place(model, world=world, checkpointing=False, sync_batch_norm=False)
    if strategy == "replicate":
        placement = replicated(model, world)
        if method == "full":  # buckets so small that there are several
            parameters = list(placement.parameters.values())
            placement = dataclasses.replace(placement, exchange=OverlappedReducer(world, parameters, bucket_bytes=10_000))
    else:
        placement = sharded(model, here, strategy=strategy, precision=FP32, sums_each_pass=how == "each-pass")
    return model, Objective(model, backend_named("cpu"), placement.within), placement


def learn(world: World, base: str, method: str, strategy: str, steps: int):
    """Loss, norm, bytes sent and passes of each step, the rows of this process in each step, and the evaluation afterwards."""
    model, objective, placement = make_placed(world, base, method, strategy)
    optimizer = make_optimizer("adamw", placement.parameters, weight_decay=0.1)
    set_learning_rate(optimizer, 1e-3)
    results, rows = [], []
    world.traffic.take()
    for batch in loader_of(world, placement, steps):
        microbatches = batch.microbatches
        counts = torch.tensor([sum(each.num_targets for each in microbatches), len(microbatches)])
        world.sum_(counts)
        world.traffic.take()
        result = train_step(
            objective.loss_sum,
            optimizer,
            microbatches,
            divisors=[int(counts[0])],
            seed=0,
            limits=Limits(0.5),
            reducer=placement.exchange,
            clock=PartClock(),
        )
        rows.append([key for each in microbatches for key in each.keys])
        results.append([float(result.loss), float(result.grad_norm), world.traffic.take(), len(microbatches)])
    batches = next(loader_of(world, placement, 1)).microbatches
    evaluation = evaluate(objective.stats, model, batches, world=world)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"steps": results, "rows": rows, "evaluation": [evaluation.loss, evaluation.targets], "trained": trained}


def loader_of(world: World, placement: Placement, steps: int) -> Loader:
    return Loader(
        ROWS,
        plain_order(ROWS.num_rows),
        batch_size=BATCH,
        micro_batch_tokens=30,
        seed=3,
        total_positions=BATCH * steps,
        rank=world.rank,
        world_size=world.size,
        equal_passes=placement.equal_passes,
    )


def every_placement(world: World, payload):
    strategies = ("replicate", "shard", "hybrid") if world.size > 1 else ("replicate",)
    pairs = [(method, strategy) for method in ("lora", "full") for strategy in strategies]
    pairs += [("full", f"{strategy} each-pass") for strategy in strategies[1:]]
    pairs += [(method, f"{strategy} by-rows") for method in ("lora", "full") for strategy in strategies[1 : world.size]]
    return {f"{method} {strategy}": learn(world, payload["base"], method, strategy, payload["steps"]) for method, strategy in pairs}


def sums_on_the_network(world: World, payload):
    """Bytes sent for ten sums: by all processes over loopback as the kernel counts them, and by this process as `Traffic` counts them."""
    tensor = torch.zeros(payload["numbers"])
    world.sum_(tensor)  # the first one opens the connections
    world.barrier()
    before = _sent()
    world.traffic.take()
    for _ in range(10):
        world.sum_(tensor)
    world.barrier()
    return {"wire": _sent() - before, "counted": world.traffic.take()["net/sent"]}


def _sent() -> int:
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split()[9])
