"""How the weights of a model lie on the processes: whole on each of them (replicate), or in rows (shard, hybrid), on torch's FSDP2.

Sharded weights are put together layer by layer just before they are needed, the next layer's while this one computes, and dropped again.
Adapters are few and stay whole on every process: only the frozen weights below them are sharded, and these never send a gradient. When
all weights are trained, a process updates its rows of each alone: `parameters` are these rows as plain tensors that share their memory
with the model's. Gradients are summed in float32, once per step, or after every pass where whole ones do not fit until the last. Hybrid
shards inside a machine and repeats that on every machine.
Source: FSDP2, torch.distributed.fsdp.fully_shard; SimpleFSDP, arXiv 2411.00284; hybrid: FSDP, arXiv 2304.11277.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, Work
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from llamahome.distributed.exchange import Exchange, FlatExchange, OverlappedExchange, Summed, sum_of_squares
from llamahome.distributed.tensorfiles import Pieces
from llamahome.distributed.world import World
from llamahome.model.load import decoder_layers
from llamahome.model.objective import Within, directly
from llamahome.model.place import trained_parameters
from llamahome.model.precision import Precision
from llamahome.model.strategy import Strategy

T = TypeVar("T")


@dataclass(frozen=True)
class Placement:
    """How the weights of a run lie, and what everything that touches them has to know of it."""

    strategy: Strategy
    parameters: dict[str, nn.Parameter]
    """What this process updates, by the name of the weight: the whole weight, or its rows of it."""
    exchange: Exchange
    within: Within = directly
    """Does work that reads whole weights. When sharded all processes call it equally often, each with a pass of the model."""
    cut: Mapping[str, DTensor] = field(default_factory=dict)
    """The trained weights that are sharded, as the model holds them."""

    @property
    def equal_passes(self) -> bool:
        """Whether all processes have to run the model equally often."""
        return self.strategy != "replicate"

    def pieces(self, name: str, mine: Tensor) -> Tensor | Pieces:
        """`mine` is this process's share of weight `name` or of something of its shape: the whole that it is a piece of."""
        weight = self.cut.get(name)
        if weight is None or mine.ndim == 0:
            return mine

        def fetch() -> Tensor:
            layout: dict[str, Any] = {"shape": weight.shape, "stride": weight.stride(), "run_check": False}
            return DTensor.from_local(mine.detach(), weight.device_mesh, weight.placements, **layout).full_tensor()

        return Pieces(weight.numel() * mine.element_size(), fetch)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What this process holds of a whole tensor of the shape of weight `name`."""
        weight = self.cut.get(name)
        if weight is None or whole.ndim == 0:
            return whole
        first, rows = _rows_of(weight)
        return whole.narrow(0, first, rows)


def replicated(model: nn.Module, world: World) -> Placement:
    """Every process holds all weights; a rank has as many passes as it needs."""
    trained = trained_parameters(model)
    few = len(trained) < sum(1 for _ in model.parameters())
    make = FlatExchange if few or world.size == 1 else OverlappedExchange
    return Placement("replicate", trained, make(world, list(trained.values())))


def sharded(
    model: PreTrainedModel, world: World, *, strategy: Literal["shard", "hybrid"], precision: Precision, sums_each_pass: bool = False
) -> Placement:
    """Cut the weights of `model` in place; all processes call it, with more than one of them.

    Weights may lie on the CPU before: each layer is moved to the device and cut there, one after the other. With `sums_each_pass` no
    process keeps whole gradients between passes; then they are sent in every pass instead of once per step.
    """
    trained = trained_parameters(model)
    apart = set(trained.values()) if len(trained) < sum(1 for _ in model.parameters()) else set()
    for adapter in apart:
        adapter.data = adapter.data.to(world.device)
    mesh = _make_mesh(world, strategy)
    low = MixedPrecisionPolicy(param_dtype=precision.compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    settings: dict[str, Any] = {"mesh": mesh, "ignored_params": apart}
    layers = decoder_layers(model)
    for layer in layers:
        fully_shard(layer, mp_policy=low if precision.autocast else MixedPrecisionPolicy(), **settings)
    root: Any = fully_shard(_Whole(model), mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **settings)
    modules = [module for module in root.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        _count(module, mesh, world)
    root.set_reduce_scatter_unused_params(True)
    for this, following in itertools.pairwise(layers):
        this.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([this])
    if apart:
        return Placement(strategy, trained, FlatExchange(world, list(trained.values()), passes_wait=True), root)
    cut = {name: weight for name, weight in trained_parameters(model).items() if isinstance(weight, DTensor)}
    parts = {name: nn.Parameter(weight.to_local().detach()) for name, weight in cut.items()}
    copies = mesh.size(0) if mesh.ndim == 2 else 1
    exchange = ShardedExchange(world, root, cut=cut, parts=parts, copies=copies, sums_each_pass=sums_each_pass)
    return Placement(strategy, parts, exchange, root, cut)


class ShardedExchange:
    """FSDP2 sums gradients in the last backward pass, or in every one; what is left is one exchange of two numbers."""

    def __init__(
        self,
        world: World,
        root: FSDPModule,
        *,
        cut: Mapping[str, DTensor],
        parts: dict[str, nn.Parameter],
        copies: int,
        sums_each_pass: bool = False,
    ) -> None:
        """`copies`: how many processes hold the same rows."""
        self.world, self.passes_wait = world, True
        self._root, self._cut, self._parts, self._copies, self._sums_each_pass = root, cut, parts, copies, sums_each_pass

    def before_backward(self, *, last: bool) -> None:
        """Gradients stay on the process until the last pass, whole or as its rows; only then do copies of the same rows sum them."""
        self._root.set_requires_gradient_sync(last or self._sums_each_pass)
        self._root.set_requires_all_reduce(last)

    def finish(self, loss: Tensor, *, gave_up: bool = False) -> Summed:
        """Hand the summed gradients over to the rows that are updated; nobody can have given up, for the others would still wait."""
        for name, weight in self._cut.items():
            gradient, weight.grad = weight.grad, None
            self._parts[name].grad = gradient.to_local() if isinstance(gradient, DTensor) else None
        square = sum_of_squares([part.grad for part in self._parts.values() if part.grad is not None]) / self._copies
        sums = torch.stack([loss.detach().double(), square.to(loss.device)])
        self.world.sum_(sums)
        return Summed(sums[0].float(), sums[1].sqrt().float(), torch.zeros_like(loss))


class _Whole(nn.Module):
    """A model behind one forward, where FSDP2 has its place: whatever of the model `work` runs, it runs inside of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], T]) -> T:
        """What `work` returns."""
        return work()


class _CountedGather(DefaultAllGather):
    """Gathers, and counts what that sends."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, async_op: bool = False) -> Work | None:
        self.world.traffic.gathered(output_tensor.nbytes, group.size())
        with self.world.guarded():
            return super().__call__(output_tensor, input_tensor, group, async_op)


class _CountedScatter(DefaultReduceScatter):
    """Sums and deals out, and counts what that sends."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, op: Any, async_op: bool = False) -> Work:
        self.world.traffic.gathered(input_tensor.nbytes, group.size())
        with self.world.guarded():
            return super().__call__(output_tensor, input_tensor, group, op, async_op)


def _count(module: FSDPModule, mesh: DeviceMesh, world: World) -> None:
    """Count what FSDP2 sends for `module`, also the sum over machines when the mesh has two sides."""
    module.set_custom_all_gather(_CountedGather(world))
    module.set_custom_reduce_scatter(_CountedScatter(world))
    if mesh.ndim == 2:
        module.set_all_reduce_hook(lambda rows: world.traffic.summed(rows.nbytes, mesh.size(0)))


def _make_mesh(world: World, strategy: Literal["shard", "hybrid"]) -> DeviceMesh:
    if strategy == "shard":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shape = (world.size // world.local_size, world.local_size)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def _rows_of(weight: DTensor) -> tuple[int, int]:
    """First row and number of rows of `weight` on this process: FSDP2 cuts as torch.chunk does, the last processes may have none."""
    mesh = weight.device_mesh
    ranks, here = mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1)
    each = -(-weight.shape[0] // ranks)
    first = min(here * each, weight.shape[0])
    return first, min(each, weight.shape[0] - first)
