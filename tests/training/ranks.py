"""The worker processes of test_ranks.py: steps over the share of a rank, some not finite on one rank, some too large for its memory."""

import dataclasses
from pathlib import Path

import torch
from tests.support.models import FP32, examples_of
from tests.support.runs import RunOptions, close_run, make_learner, make_run, table_of

from llamahome.data.steps.batching import divide
from llamahome.data.steps.loader import make_microbatch
from llamahome.distributed.reducer import FlatReducer, OverlappedReducer
from llamahome.distributed.world import World
from llamahome.errors import LlamaHomeError
from llamahome.model.shard import sharded
from llamahome.monitoring.throughput import PartClock
from llamahome.training.evaluate import evaluate
from llamahome.training.loop import train
from llamahome.training.optimizer import make_optimizer, set_learning_rate
from llamahome.training.run import first_state
from llamahome.training.spikes import Limits
from llamahome.training.step import train_step

LENGTHS = (31, 18, 18, 9, 40, 2, 1, 13)


def share_of(examples, rank: int, size: int):
    packs = divide([len(example.tokens) for example in examples], world_size=size, micro_batch_tokens=30)
    return [make_microbatch([examples[i] for i in pack], keys=pack, index=n) for n, pack in enumerate(packs[rank])]


def three_steps(world: World, payload):
    """Three steps; the second is not finite on the last rank."""
    learner, steps = make_learner(Path(payload["base"]), payload["method"], weight_decay=0.1), []
    set_learning_rate(learner.optimizer, 1e-3)
    for number, lengths in enumerate([LENGTHS, LENGTHS, (25,)]):  # the last batch is one example: a rank has nothing to do
        examples = examples_of(lengths, seed=number)
        mine = share_of(examples, world.rank, world.size)
        factor = float("nan") if number == 1 and world.rank == world.size - 1 else 1.0
        result = train_step(
            lambda batch, factor=factor: learner.objective.loss_sum(batch) * factor,
            learner.optimizer,
            mine,
            num_targets=sum(int(example.targets.sum()) for example in examples),
            seed=0,
            limits=Limits(0.5),
            reducer=FlatReducer(world, list(learner.parameters.values())),
            clock=PartClock(),
        )
        steps.append([float(result.loss), float(result.grad_norm), float(result.refused)])
    found = evaluate(learner.objective.stats, learner.model, share_of(examples_of(LENGTHS), world.rank, world.size), world=world)
    return {"steps": steps, "weights": flat_weights(learner), "evaluation": [found.loss, found.accuracy, found.targets]}


def short_of_memory(world: World, payload):
    """Five steps through the loop; a pass of more than `room` tokens does not fit into the memory of process `rank`.

    Returns the weights and warnings of this rank, or the error that ended it.
    """
    learner = make_learner(Path(payload["base"]), payload["method"])
    placement, parameters = payload["strategy"], list(learner.parameters.values())
    if placement == "shard":
        placed = sharded(learner.model, world, strategy="shard", precision=FP32)
        learner.objective = dataclasses.replace(learner.objective, within=placed.within)
        learner.parameters, exchange = placed.parameters, placed.exchange
        learner.optimizer = make_optimizer("adamw", learner.parameters, weight_decay=0.0)
    else:
        exchange = FlatReducer(world, parameters) if placement == "flat" else OverlappedReducer(world, parameters, bucket_bytes=10_000)
    shortage = Shortage(learner, room=payload["room"] if world.rank == payload["rank"] else 10**6, within=payload["within"])
    folder = Path(payload["folder"]) / f"{placement}-{world.rank}"
    plan = RunOptions(table_of(examples_of(LENGTHS, seed=1)), folder, steps=5, objective=shortage.loss_sum, save=lambda state: folder)
    run = make_run(learner, plan)
    loader = dataclasses.replace(run.loader, rank=world.rank, world_size=world.size, equal_passes=placement == "shard")
    run = dataclasses.replace(run, reducer=exchange, loader=loader)
    try:
        state = train(run, first_state(60)).state
    except LlamaHomeError as error:
        return {"error": str(error)}
    finally:
        close_run(run)
    return {"weights": flat_weights(learner), "budget": state.micro_batch_tokens, "step": state.step, "warnings": plan.progress.warnings}


def flat_weights(learner) -> list[float]:
    return torch.cat([parameter.detach().flatten() for parameter in learner.parameters.values()]).tolist()


class Shortage:
    """The objective of a process whose memory holds passes of `room` tokens: larger ones fail in the forward or at their very end."""

    def __init__(self, learner, *, room: int, within: str) -> None:
        self.learner, self.room, self.within, self.tokens = learner, room, within, 0
        first = next(iter(learner.parameters.values()))  # of the first layer: its gradient comes last
        first.register_hook(self.after_backward)

    def loss_sum(self, batch):
        self.tokens = batch.num_tokens
        if self.within == "forward" and self.tokens > self.room:
            raise MemoryError
        return self.learner.objective.loss_sum(batch)

    def after_backward(self, gradient):
        if self.within == "backward" and self.tokens > self.room:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.")
