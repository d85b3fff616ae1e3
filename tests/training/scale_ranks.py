"""The worker process of test_loss_scale.py: a step in float16 whose gradient overflows on one rank."""

from pathlib import Path

import torch
from tests.support.models import examples_of
from tests.support.runs import make_learner
from tests.training.ranks import LENGTHS, share_of

from llamahome.distributed.reducer import FlatReducer
from llamahome.distributed.world import World
from llamahome.model.precision import Precision
from llamahome.monitoring.throughput import PartClock
from llamahome.training.loss_scale import LossScale, Overflowed
from llamahome.training.optimizer import set_learning_rate
from llamahome.training.spikes import Limits
from llamahome.training.step import train_step

HALF = Precision(torch.float16, torch.float16, "a test")


def overflows_on_the_last(world: World, payload):
    """Tries of one step until it is done, and the weights after it."""
    learner, scale, tries = make_learner(Path(payload["base"]), "lora", precision=HALF), LossScale(), 0
    set_learning_rate(learner.optimizer, 1e-3)
    examples = examples_of(LENGTHS)

    def objective(batch):
        loss = learner.objective.loss_sum(batch)
        if world.rank == world.size - 1 and scale.scale > 1024:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    while True:
        tries += 1
        result = train_step(
            objective,
            learner.optimizer,
            share_of(examples, world.rank, world.size),
            divisors=[sum(int(example.targets.sum()) for example in examples)],
            seed=0,
            limits=Limits(1.0, scale=scale),
            reducer=FlatReducer(world, list(learner.parameters.values())),
            clock=PartClock(),
        )
        if not isinstance(result, Overflowed):
            break
    weights = torch.cat([weight.flatten() for weight in learner.weights().values()]).tolist()
    return {"tries": tries, "scale": scale.values(), "loss": float(result.loss), "refused": float(result.refused), "weights": weights}
