"""Places the weights of a model on the processes: whole on each process (replicate) or sharded by rows (shard, hybrid) with torch's FSDP2.

Sharded weights are gathered layer by layer just before they are needed, the next layer while this one computes, and freed again.
Adapters are small and stay whole on every process: only the frozen weights are sharded, and these have no gradient. If all weights are
trained, each process updates its rows of each weight: `parameters` are these rows as plain tensors that share memory with the model's.
Gradients are summed in float32 once per step, or after every pass if whole gradients do not fit into memory. Hybrid shards within a
machine and replicates over machines.
Source: FSDP2, torch.distributed.fsdp.fully_shard; SimpleFSDP, arXiv 2411.00284; hybrid: FSDP, arXiv 2304.11277.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup, Work
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from llamahome.distributed.reducer import FlatReducer, OverlappedReducer, Reducer, Summed, sum_of_squares
from llamahome.distributed.tensorfiles import TensorSlices, collect
from llamahome.distributed.world import World
from llamahome.model.load import decoder_layers
from llamahome.model.objective import Within, directly
from llamahome.model.pass_guard import PassGuard
from llamahome.model.place import Strategy, trained_parameters
from llamahome.model.precision import Precision
from llamahome.model.shard_load import give_rows, keep_compute, make_mesh, mesh_of, range_of, row_range, take_rows

T = TypeVar("T")


@dataclass(frozen=True)
class Placement:
    """Where the weights of a run are, and what other code needs to know about it."""

    strategy: Strategy
    parameters: dict[str, nn.Parameter]
    """Name of the weight -> what this process updates: the whole weight, or its rows."""
    exchange: Reducer
    within: Within = directly
    """Runs a function that reads whole weights. If sharded, all processes call it equally often, each with a pass of the model."""
    cut: Mapping[str, DTensor] = field(default_factory=dict)
    """The trained weights that are sharded, as the model contains them."""

    @property
    def equal_passes(self) -> bool:
        """Whether all processes must run the model equally often."""
        return self.strategy != "replicate"

    def pieces(self, name: str, mine: Tensor, world: World) -> Tensor | TensorSlices:
        """The whole tensor that `mine` belongs to; `mine` is this process's share of weight `name` or of a tensor of its shape.

        It is fetched in messages of the group of `world`. With hybrid the processes of the machine that writes send its rows.
        """
        weight = self.cut.get(name)
        if weight is None or mine.ndim == 0:
            return mine
        machine = weight.device_mesh.size(-1)
        counts = [count for _, count in (range_of(weight.shape[0], number, machine) for number in range(machine))]

        def fetch(to: int) -> Tensor | None:
            return collect(world, mine, counts, first=to // machine * machine, to=to)

        return TensorSlices(weight.numel() * mine.element_size(), fetch)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """The share of this process of a whole tensor of the shape of weight `name`."""
        weight = self.cut.get(name)
        if weight is None or whole.ndim == 0:
            return whole
        return whole.narrow(0, *row_range(weight.shape[0], weight.device_mesh))


def replicated(model: nn.Module, world: World) -> Placement:
    """Keep all weights on every process; each rank runs as many passes as it needs."""
    trained = trained_parameters(model)
    few = len(trained) < sum(1 for _ in model.parameters())
    make = FlatReducer if few or world.size == 1 else OverlappedReducer
    return Placement("replicate", trained, make(world, list(trained.values())))


def sharded(
    model: PreTrainedModel, world: World, *, strategy: Literal["shard", "hybrid"], precision: Precision, sums_each_pass: bool = False
) -> Placement:
    """Shard the weights of `model` in place. Called by all processes of a world of more than one.

    Each process holds whole weights, or its rows (shard_load.py), which then stay where they are. Whole weights may be on the CPU: each
    layer is moved to the device and sharded there, one after the other. With `sums_each_pass` no process keeps whole gradients between
    passes; they are then sent in every pass instead of once per step.
    """
    trained, mesh = trained_parameters(model), mesh_of(model) or make_mesh(world, strategy)
    apart = set(trained.values()) if len(trained) < sum(1 for _ in model.parameters()) else set()
    for adapter in apart:
        adapter.data = adapter.data.to(world.device)
    rows = take_rows(model)
    low = MixedPrecisionPolicy(param_dtype=precision.compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    settings: dict[str, Any] = {"mesh": mesh, "ignored_params": apart}
    layers = decoder_layers(model)
    for layer in layers:
        fully_shard(layer, mp_policy=low if precision.autocast else MixedPrecisionPolicy(), **settings)
    root: Any = fully_shard(_Whole(model), mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **settings)
    give_rows(rows)
    if precision.autocast:
        keep_compute(model, precision.compute)
    guard = PassGuard(root, layers, device=world.device, whole=not apart)
    modules = [module for module in root.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        _own_collectives(module, mesh, world, guard)
    root.set_reduce_scatter_unused_params(True)
    for this, following in itertools.pairwise(layers):
        this.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([this])
    if apart:
        return Placement(strategy, trained, FlatReducer(world, list(trained.values()), guard=guard), guard.within)
    cut = {name: weight for name, weight in trained_parameters(model).items() if isinstance(weight, DTensor)}
    parts = {name: nn.Parameter(weight.to_local().detach()) for name, weight in cut.items()}
    copies = mesh.size(0) if mesh.ndim == 2 else 1
    exchange = ShardedReducer(world, root, guard, cut=cut, parts=parts, copies=copies, sums_each_pass=sums_each_pass)
    return Placement(strategy, parts, exchange, guard.within, cut)


class ShardedReducer:
    """FSDP2 sums the gradients in the last backward pass, or in every one; `finish` sums only loss and norm."""

    def __init__(
        self,
        world: World,
        root: FSDPModule,
        guard: PassGuard,
        *,
        cut: Mapping[str, DTensor],
        parts: dict[str, nn.Parameter],
        copies: int,
        sums_each_pass: bool = False,
    ) -> None:
        """`copies` is the number of processes that hold the same rows."""
        self.world, self.guard, self.collective_in_forward = world, guard, True
        self._root, self._cut, self._parts, self._copies, self._sums_each_pass = root, cut, parts, copies, sums_each_pass

    def before_backward(self, *, last: bool) -> None:
        """Gradients stay on the process until the last pass; only then do processes with the same rows sum them."""
        self._root.set_requires_gradient_sync(last or self._sums_each_pass)
        self._root.set_requires_all_reduce(last)

    def finish(self, loss: Tensor, *, gave_up: bool = False) -> Summed:
        """Give the summed gradients to the rows that are updated."""
        for name, weight in self._cut.items():
            gradient, weight.grad = weight.grad, None
            self._parts[name].grad = gradient.to_local() if isinstance(gradient, DTensor) else None
        square = sum_of_squares([part.grad for part in self._parts.values() if part.grad is not None]) / self._copies
        values = loss.detach().double().reshape(-1)
        sums = torch.cat([torch.full_like(values[:1], float(gave_up)), square.to(values).reshape(1), values])
        self.world.sum_(sums)
        return Summed(sums[2].float(), sums[1].sqrt().float(), sums[0].float(), sums[3:].float())


class _Whole(nn.Module):
    """The root module for FSDP2: `work` runs parts of the model inside its forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], T]) -> T:
        """Call `work` and return its result."""
        return work()


class _Collective:
    """An all-gather or reduce-scatter for FSDP2 (its `Comm` interface) that counts the bytes sent, reports a lost peer, and takes place on
    a rank whose memory has run out, too.
    """

    def __init__(self, world: World, guard: PassGuard, collective: Callable[..., Work | None], *, copies: int = 1) -> None:
        """FSDP2 copies what it gathers to where it is used: `copies` of 2 asks for the memory of both at once, before others wait."""
        self._world, self._guard, self._collective, self._copies = world, guard, collective, copies

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is sent or received; if there is none, what the pass of this rank has kept makes room."""
        return self._guard.allocating(lambda: [torch.empty(*size, dtype=dtype, device=device) for _ in range(self._copies)])[0]

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, **options: Any) -> Work | None:
        """Run the collective; `options` are `op` and `async_op`."""
        self._world.traffic.gathered(max(output_tensor.nbytes, input_tensor.nbytes), group.size())
        with self._world.guarded():
            return self._collective(output_tensor, input_tensor, group=group, **options)


def _own_collectives(module: Any, mesh: DeviceMesh, world: World, guard: PassGuard) -> None:
    """Let `module` use ours, and count what it sums over machines if the mesh has two dimensions."""
    module.set_custom_all_gather(_Collective(world, guard, dist.all_gather_single, copies=2))
    module.set_custom_reduce_scatter(_Collective(world, guard, dist.reduce_scatter_single))
    if mesh.ndim == 2:
        module.set_all_reduce_hook(lambda rows: world.traffic.summed(rows.nbytes, mesh.size(0)))
