"""One step of a shallow model on ranks that do not exist, placed as a run places it: what is exchanged, not what is computed.

Weights and gradients have shapes and take no memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llamahome.distributed.fake_group import CollectiveRecorder, RecordedCollective, fake_world
from llamahome.distributed.world import World
from llamahome.model.backends.reference import Reference
from llamahome.model.load import CausalLM
from llamahome.model.objective import Objective
from llamahome.model.place import place
from llamahome.model.precision import Precision
from llamahome.model.shard import replicated, sharded
from llamahome.model.skeleton import pretend
from llamahome.planning.forecast import Cluster, Strategy
from llamahome.planning.traffic import Collective, RankGroup

_REHEARSED_TOKENS = 16
"""Of a pass: what is exchanged does not depend on it."""


@dataclass(frozen=True)
class DryRun:
    """One step of one strategy as a shallow model did it."""

    first_pass: list[Collective]
    """Exchanges of a pass that is not the last of its step."""
    last_pass: list[Collective]
    """Those of the last one and of the end of the step."""


def dry_run_step(
    model: CausalLM, precision: Precision, cluster: Cluster, *, strategy: Strategy, passes: int = 2, sums_each_pass: bool = False
) -> DryRun:
    """Place `model` (on the meta device) and do a step of one or two passes; returns what was exchanged."""
    with fake_world(cluster.ranks, local_size=min(cluster.per_node, cluster.ranks)) as world:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake:
            pretend(model)
        run = _placed(model, precision, world, strategy, sums_each_pass)
        with fake, CollectiveRecorder() as witness:
            if passes > 1:
                run(False)
            between = len(witness.seen)
            run(True)
        first, last = witness.seen[:between], witness.seen[between:]
    return DryRun([_exchange(each, cluster) for each in first], [_exchange(each, cluster) for each in last])


def _placed(model: CausalLM, precision: Precision, world: World, strategy: Strategy, sums_each_pass: bool) -> Callable[[bool], None]:
    """Place `model` as a run does; returns its forward and backward pass, which takes whether it is the last of its step."""
    place(model, world=world, checkpointing=False, sync_batch_norm=False)
    if strategy == "replicate":
        placement = replicated(model, world)
    else:
        placement = sharded(model, world, strategy=strategy, precision=precision, sums_each_pass=sums_each_pass)
    objective = Objective(model, Reference(world.device, precision), placement.within)

    def run(last: bool) -> None:
        loss = objective.loss_sum(_Document())
        placement.exchange.before_backward(last=last)
        loss.backward()  # type: ignore[no-untyped-call]
        if last:
            placement.exchange.finish(loss.detach())

    return run


class _Document:
    """One short document, all of it learned."""

    def __init__(self) -> None:
        self.tokens_T = torch.zeros(_REHEARSED_TOKENS, dtype=torch.int64)
        self.positions_T = torch.arange(_REHEARSED_TOKENS)
        self.lengths = (_REHEARSED_TOKENS,)
        self.rows_N = torch.arange(_REHEARSED_TOKENS - 1)
        self.labels_N = torch.zeros(_REHEARSED_TOKENS - 1, dtype=torch.int64)
        self.groups = ()
        self.documents = None
        self.extra: dict[str, torch.Tensor] = {}


def _exchange(seen: RecordedCollective, cluster: Cluster) -> Collective:
    """The same for planning/, which needs the number of ranks and how many of them sit on the machine of rank 0."""
    here = sum(rank < cluster.per_node for rank in seen.ranks)
    return Collective(seen.kind, seen.whole_bytes, RankGroup(len(seen.ranks), here))  # type: ignore[arg-type]
