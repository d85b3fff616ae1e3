"""Loads only this process's rows of the weights of a sharded run.

The model is made without weights. Its parameters are distributed tensors that are cut by rows as FSDP2 cuts them, so transformers' loader
reads this process's rows from the files, by byte range, and stacked experts one by one. While the model is tested and gets adapters, each
parameter stays a distributed tensor with the shape of the whole; `take_rows` and `give_rows` hand its rows to FSDP2 without a copy.
Weights that transformers makes of several tensors in other ways than by stacking are read whole and cut afterwards.
Memory: the rows of this process, and one tensor while it is made. Rows that keep the dtype of the file stay memory-mapped on a processor.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming, rename_source_key

from llamahome.distributed.world import World

_COMPUTE = "llamahome_gathered_dtype"
Mesh = DeviceMesh
"""The processes that share a model, in one row or in one for each machine."""
Taken = list[tuple[nn.Module, str, nn.Parameter]]
"""Parameters that were replaced: the module, the name in it, and the parameter that was there."""


def make_mesh(world: World, strategy: Literal["shard", "hybrid"]) -> DeviceMesh:
    """The processes in one row, or with hybrid in one row for each machine. All processes call it."""
    if strategy == "shard":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shape = (world.size // world.local_size, world.local_size)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """The processes that share the rows of `model`; None if each has whole weights."""
    return next((weight.device_mesh for weight in model.parameters() if isinstance(weight, DTensor)), None)


def row_range(rows: int, mesh: DeviceMesh) -> tuple[int, int]:
    """First row and number of rows of this process."""
    return range_of(rows, mesh.get_local_rank(mesh.ndim - 1), mesh.size(-1))


def range_of(rows: int, number: int, processes: int) -> tuple[int, int]:
    """First row and number of rows of one of the processes. They are cut like torch.chunk, so the last ones may have none."""
    each = -(-rows // processes)
    first = min(number * each, rows)
    return first, min(each, rows - first)


def class_of_rows(of_config: Any, mesh: DeviceMesh, names: Iterable[str]) -> Any:
    """A subclass of a model's class whose parameters are cut by rows when it is made; `names` are those of the tensors in the files."""

    def make(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        of_config.__init__(self, *args, **kwargs)
        cut_rows(self, mesh, whole=_read_whole(self, names, mesh.size(-1)))

    return type(of_config.__name__, (of_config,), {"__init__": make, "__module__": of_config.__module__})


def _read_whole(model: PreTrainedModel, names: Iterable[str], processes: int) -> set[str]:
    """Weights whose rows are not those of a tensor in the files, nor of tensors that lie on top of each other."""
    mapping = get_model_conversion_mapping(model)
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    sources = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, whole = model.state_dict(), set()
    for key in names:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if pattern is None or (_stacks(sources[pattern]) and name in state and _all_have_rows(state[name].shape[0], processes)):
            continue
        targets = sources[pattern].target_patterns
        whole |= {name.replace(targets[0], target) for target in targets}
    return whole


def _stacks(converter: WeightConverter) -> bool:
    """Whether a row of the weight is one tensor of the files, or several side by side."""
    first, *others = converter.operations
    return isinstance(first, MergeModulelist) and first.dim == 0 and all(isinstance(each, Concatenate) and each.dim > 0 for each in others)


def _all_have_rows(rows: int, processes: int) -> bool:
    return math.ceil(rows / processes) * (processes - 1) < rows


@torch.no_grad()
def cut_rows(model: nn.Module, mesh: DeviceMesh, *, whole: Collection[str] = ()) -> None:
    """Replace each whole parameter of `model`, but for those named in `whole`, by this process's rows of it."""
    kept = {id(weight) for name, weight in model.named_parameters() if name in whole}

    def rows_of(weight: nn.Parameter) -> Tensor | None:
        if isinstance(weight, DTensor) or not weight.ndim or id(weight) in kept:
            return None
        rows = weight.detach().narrow(0, *row_range(weight.shape[0], mesh))
        placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
        layout: dict[str, Any] = {"shape": weight.shape, "stride": weight.stride(), "run_check": False}
        return DTensor.from_local(rows if rows.is_meta else rows.clone(), mesh, placements, **layout)

    _replace(model, rows_of)


def _replace(model: nn.Module, make: Callable[[nn.Parameter], Tensor | None]) -> Taken:
    """Replace each parameter for which `make` returns a tensor, once for all modules that share it."""
    made: dict[int, nn.Parameter | None] = {}
    taken: Taken = []
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is None:
                continue
            if id(weight) not in made:
                tensor = make(weight)
                made[id(weight)] = None if tensor is None else nn.Parameter(tensor, requires_grad=weight.requires_grad)
            if (parameter := made[id(weight)]) is not None:
                taken.append((module, name, weight))
                module._parameters[name] = parameter
    return taken


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """`model` with whole weights where it has rows. All processes enter it, and hold all of its weights within."""
    taken = _replace(model, lambda weight: weight.full_tensor() if isinstance(weight, DTensor) else None)
    try:
        yield
    finally:
        for module, name, rows in taken:
            module._parameters[name] = rows


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """`model` with plain tensors where it has rows, of the shape of the whole and without memory; their values are NaN.

    PEFT would make adapters for the shape of the rows.
    """

    def stand_in(weight: nn.Parameter) -> Tensor | None:
        if not isinstance(weight, DTensor):
            return None
        value = math.nan if weight.is_floating_point() else 0
        return torch.full((), value, dtype=weight.dtype, device=weight.to_local().device).expand(weight.shape)

    taken = _replace(model, stand_in)
    try:
        yield
    finally:
        for module, name, rows in taken:
            rows.requires_grad_(module._parameters[name].requires_grad)  # type: ignore[union-attr]
            module._parameters[name] = rows


def whole_of(weight: Tensor) -> Tensor:
    """`weight`, gathered if this process has rows of it: all processes call it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def local_of(weight: Tensor) -> Tensor:
    """What this process holds of `weight`."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def take_rows(model: nn.Module) -> Taken:
    """Replace parameters of which this process has rows by ones without values, which FSDP2 shards at no cost; returns the rows."""

    def without_values(weight: nn.Parameter) -> Tensor | None:
        return torch.empty(weight.shape, dtype=weight.dtype, device="meta") if isinstance(weight, DTensor) else None

    return _replace(model, without_values)


def give_rows(taken: Taken) -> None:
    """Put rows where FSDP2 has sharded the parameters that `take_rows` left."""
    for module, name, rows in taken:
        module.load_state_dict({name: rows}, strict=False, assign=True)


def keep_compute(model: nn.Module, dtype: torch.dtype) -> None:
    """Note that the layers of a sharded `model` are gathered in `dtype`, which its stored weights do not have."""
    setattr(model, _COMPUTE, dtype)


def generating(model: PreTrainedModel) -> AbstractContextManager[object]:
    """Where transformers' own code runs a model: products of gathered layers are computed in the dtype in which they were gathered."""
    dtype: torch.dtype | None = getattr(model, _COMPUTE, None)
    return nullcontext() if dtype is None else torch.autocast(model.device.type, dtype)


def smallest(values: Tensor, model: nn.Module) -> Tensor:
    """The smallest of each of `values` on the processes that share the rows of `model`, all of which call it."""
    if mesh_of(model) is not None:
        dist.all_reduce(values, dist.ReduceOp.MIN)
    return values
