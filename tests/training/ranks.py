"""What the worker processes of test_ranks.py do: three steps over this rank's share, of which the second is spoilt on the last rank."""

from pathlib import Path

import torch
from tests.support.models import examples_of
from tests.support.runs import make_learner

from llamahome.data.steps.batching import divide
from llamahome.data.steps.loader import make_microbatch
from llamahome.distributed.exchange import FlatExchange
from llamahome.distributed.world import World
from llamahome.monitoring.throughput import PartClock
from llamahome.training.evaluate import evaluate
from llamahome.training.optimizer import set_learning_rate
from llamahome.training.step import train_step

LENGTHS = (31, 18, 18, 9, 40, 2, 1, 13)


def share_of(examples, rank: int, size: int):
    packs = divide([len(example.tokens) for example in examples], world_size=size, micro_batch_tokens=30)
    return [make_microbatch([examples[i] for i in pack], keys=pack, index=n, device="cpu") for n, pack in enumerate(packs[rank])]


def three_steps(world: World, payload):
    learner, told = make_learner(Path(payload["base"]), payload["method"], weight_decay=0.1), []
    set_learning_rate(learner.optimizer, 1e-3)
    for number, lengths in enumerate([LENGTHS, LENGTHS, (25,)]):  # the last batch is one example: a rank has nothing to do
        examples = examples_of(lengths, seed=number)
        mine = share_of(examples, world.rank, world.size)
        spoil = float("nan") if number == 1 and world.rank == world.size - 1 else 1.0
        result = train_step(
            lambda batch, spoil=spoil: learner.objective.loss_sum(batch) * spoil,
            learner.optimizer,
            mine,
            num_targets=sum(int(example.targets.sum()) for example in examples),
            seeds=[0] * len(mine),
            max_grad_norm=0.5,
            exchange=FlatExchange(world, list(learner.parameters.values())),
            clock=PartClock(),
        )
        told.append([float(result.loss), float(result.grad_norm), float(result.refused)])
    found = evaluate(learner.objective.stats, learner.model, share_of(examples_of(LENGTHS), world.rank, world.size), world=world)
    weights = torch.cat([parameter.detach().flatten() for parameter in learner.parameters.values()])
    return {"steps": told, "weights": weights.tolist(), "evaluation": [found.loss, found.accuracy, found.targets]}
