"""The worker processes of test_label_ranks.py: three steps of KTO, each with the reference point of the one before."""

from pathlib import Path

import torch
from tests.support.labelled import labelled_table
from tests.support.runs import make_learner

from llamahome.config.preference import PreferenceConfig
from llamahome.data.steps.loader import sequential_microbatches
from llamahome.distributed.reducer import FlatReducer
from llamahome.distributed.world import World
from llamahome.monitoring.throughput import PartClock
from llamahome.training.labelled import LabelledObjective
from llamahome.training.optimizer import set_learning_rate
from llamahome.training.spikes import Limits
from llamahome.training.step import train_step


def three_steps(world: World, payload):
    """Loss, gradient norm and what is measured, of each step."""
    learner = make_learner(Path(payload["base"]), "lora")
    objective, found = LabelledObjective(PreferenceConfig(desirable_weight=1.5), learner.objective), []
    set_learning_rate(learner.optimizer, 1e-4)
    table = labelled_table()
    table.known[:] = -60.0  # the answers are likelier than in this reference, so the reference point is not 0
    divisors = torch.tensor([objective.units(batch) for batch in sequential_microbatches(table, micro_batch_tokens=40)]).sum(0).tolist()
    for _ in range(3):
        mine = sequential_microbatches(table, micro_batch_tokens=40, rank=world.rank, world_size=world.size)
        settings = {"seed": 0, "limits": Limits(1.0), "clock": PartClock(), "divisors": divisors}
        reducer = FlatReducer(world, list(learner.parameters.values()))
        result = train_step(objective.loss_sum, learner.optimizer, mine, reducer=reducer, **settings)
        objective.point.note(result.measured)
        found.append([float(result.loss), float(result.grad_norm), *result.measured.tolist()])
    return found
