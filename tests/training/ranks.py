"""The worker processes of test_ranks.py: steps over the share of a rank, some not finite on one rank, some too large for its memory."""

import dataclasses
import json
import sys
from collections import Counter
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
from llamahome.training.recovery import RunDiverged
from llamahome.training.run import first_state
from llamahome.training.spikes import Limits
from llamahome.training.step import train_step

LENGTHS = (31, 18, 18, 9, 40, 2, 1, 13)


def share_of(examples, rank: int, size: int):
    packs = divide([len(example.tokens) for example in examples], world_size=size, micro_batch_tokens=30)
    return [make_microbatch([examples[i] for i in pack], keys=pack, index=n) for n, pack in enumerate(packs[rank])]


def three_steps(world: World, payload):
    """Three steps; the second is not finite on the last rank."""
    learner, steps = (
        make_learner(Path(payload["base"]), payload["method"], weight_decay=0.1, optimizer=payload.get("optimizer", "adamw")),
        [],
    )
    set_learning_rate(learner.optimizer, 1e-3)
    for number, lengths in enumerate([LENGTHS, LENGTHS, (25,)]):  # the last batch is one example: a rank has nothing to do
        examples = examples_of(lengths, seed=number)
        mine = share_of(examples, world.rank, world.size)
        factor = float("nan") if number == 1 and world.rank == world.size - 1 else 1.0
        result = train_step(
            lambda batch, factor=factor: learner.objective.loss_sum(batch) * factor,
            learner.optimizer,
            mine,
            divisors=[sum(int(example.targets.sum()) for example in examples)],
            seed=0,
            limits=Limits(0.5),
            reducer=FlatReducer(world, list(learner.parameters.values())),
            clock=PartClock(),
        )
        steps.append([float(result.loss), float(result.grad_norm), float(result.refused)])
    found = evaluate(learner.objective.stats, learner.model, share_of(examples_of(LENGTHS), world.rank, world.size), world=world)
    return {"steps": steps, "weights": flat_weights(learner), "evaluation": [found.loss, found.accuracy, found.targets]}


def three_steps_each(world: World, payload):
    """`three_steps` with each of the `optimizers`."""
    return [three_steps(world, {**payload, "optimizer": each, "method": method}) for each, method in payload["optimizers"]]


def short_of_memory_each(world: World, payload):
    """`short_of_memory` for each of the `cases`."""
    found = []
    for number, case in enumerate(payload["cases"]):
        folder = Path(payload["folder"]) / str(number)
        folder.mkdir(exist_ok=True)
        found.append(short_of_memory(world, {**payload, **case, "folder": str(folder)}))
    return found


def short_of_memory(world: World, payload):
    """Five steps through the loop; a pass of more than `room` tokens does not fit into the memory of process `rank`.

    Returns the weights, warnings and events of this rank, or the error that ended it.
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
        torch.empty = shortage.empty
        close_run(run)
    events = [json.loads(line) for line in (folder / "metrics/events.jsonl").read_text().splitlines()] if plan.progress.warnings else []
    short = [event["processes"] for event in events if event["kind"] == "out-of-memory"]
    found = {"budget": state.micro_batch_tokens, "step": state.step, "warnings": plan.progress.warnings, "short": short}
    return {"weights": flat_weights(learner), **found}


def harmed(world: World, payload):
    """Thirty steps through the loop; one gradient is not a number on rank 1 in step 21, the loss is a hundredfold there in step 25, and so
    are three losses in a row from step 28 on if `payload` says so. Returns what each rank refused, its weights, and how it ended."""
    learner = make_learner(Path(payload["base"]), "lora")
    seen = {"step": 0}

    def objective(batch):
        loss = learner.objective.loss_sum(batch)
        return loss * 100 if world.rank == 1 and (seen["step"] == 25 or (payload["lasting"] and seen["step"] >= 28)) else loss

    def gradient(found):
        if world.rank == 1 and seen["step"] == 21:
            found = found.clone(memory_format=torch.contiguous_format)
            found.view(-1)[3] = float("nan")
        return found

    list(learner.parameters.values())[1].register_hook(gradient)
    folder = Path(payload["folder"]) / f"harmed-{world.rank}"
    plan = RunOptions(table_of(examples_of(LENGTHS, seed=1)), folder, steps=30, objective=objective, save=lambda state: folder)
    run = make_run(learner, plan)
    loader = Counted(dataclasses.replace(run.loader, rank=world.rank, world_size=world.size), seen)
    run = dataclasses.replace(run, reducer=FlatReducer(world, list(learner.parameters.values())), loader=loader)
    ended = "finished"
    try:
        train(run, first_state(60))
    except RunDiverged as error:
        ended = [step for step, _ in error.streak.steps]
    finally:
        close_run(run)
    events = [json.loads(line) for line in (folder / "metrics/events.jsonl").read_text().splitlines()]
    bad = [(event["step"], event["why"]) for event in events if event["kind"] == "bad-step"]
    return {"bad": bad, "weights": flat_weights(learner), "ended": ended}


class Counted:
    """A loader that says which step it has given out."""

    def __init__(self, loader, seen: dict[str, int]) -> None:
        self._loader, self._seen = loader, seen

    def __next__(self):
        self._seen["step"] += 1
        return next(self._loader)

    def __getattr__(self, name: str):
        return getattr(self._loader, name)


def flat_weights(learner) -> list[float]:
    return torch.cat([parameter.detach().flatten() for parameter in learner.parameters.values()]).tolist()


class Shortage:
    """The objective of a process whose memory holds passes of `room` tokens: larger ones fail before the pass, in a layer, in the head,
    in the backward pass of a layer, in an update, or where a rank gathers the weights of a layer with the others, in the forward or in the
    backward pass, or sends its gradients."""

    def __init__(self, learner, *, room: int, within: str) -> None:
        self.learner, self.room, self.within, self.tokens = learner, room, within, 0
        self.collectives = Counter()
        self.empty, torch.empty = torch.empty, self.allocate
        layers = learner.model.model.layers
        layers[1].mlp.register_forward_pre_hook(lambda *_: self.fail("layer"))
        learner.model.model.norm.register_forward_hook(lambda *_: self.fail("head"))
        layers[0].mlp.register_full_backward_hook(lambda *_: self.fail("backward"))
        learner.optimizer.register_step_pre_hook(lambda *_: self.fail("update"))

    def loss_sum(self, batch):
        self.tokens = batch.num_tokens
        self.collectives.clear()
        self.fail("forward")
        return self.learner.objective.loss_sum(batch)

    def allocate(self, *args, **kwargs):
        """torch.empty; what FSDP asks for a collective is counted in each pass. A failed one is tried again without graphs of layers."""
        frame = sys._getframe(1)
        if "_Collective.allocate" in frame.f_code.co_qualname:
            collective = (frame if "self" in frame.f_locals else frame.f_back).f_locals["self"]  # of the lambda around a comprehension
            place = "gather" if collective._copies == 2 else "scatter"
            place += " backward" if torch._C._current_graph_task_id() >= 0 else ""
            self.collectives[place] += 1
            guard = collective._guard
            if guard.message is not None and self.within.startswith(("gather", "scatter")):
                assert all(each.result is None for each in guard._kept), "the rank still holds its activations"
            self.fail(f"{place} {self.collectives[place]}")
        return self.empty(*args, **kwargs)

    def fail(self, within: str) -> None:
        if self.within == within and self.tokens > self.room:
            self.tokens = 0  # once in a pass; an update is tried a second time
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.")
