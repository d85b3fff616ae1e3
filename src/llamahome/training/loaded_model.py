"""The base of a run: where its weights are, how they are divided among the processes, and whether it fits.

What is trained is added to it later (learner.py), when the settings that depend on the model are resolved (resolve.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llamahome.config.schema import Config
from llamahome.distributed.agreement import require_agreement
from llamahome.distributed.world import World
from llamahome.errors import ConfigError, OutOfMemory, Problem
from llamahome.model.adapter import fit_rows, trained_rows
from llamahome.model.backends.backend import Backend
from llamahome.model.fingerprints import fingerprint
from llamahome.model.load import CausalLM, load_model
from llamahome.model.packing import packing_of
from llamahome.model.place import ChosenStrategy, choose_strategy, count_weights, weight_bytes
from llamahome.model.quantized_copy import expected_sizes, quantized_base
from llamahome.model.shard_load import Mesh, make_mesh
from llamahome.model.stream import hold_tables
from llamahome.model.stream_choice import must_stream
from llamahome.model.vocabulary import NewRows, describe_rows, make_rows, refuse_lost_bias
from llamahome.model.weights_size import refuse_larger_than_memory, size_in
from llamahome.monitoring.resources import free_memory_bytes
from llamahome.rundir import as_typed

Say = Callable[[str], None]


@dataclass(frozen=True)
class BaseModel:
    """The loaded base, before anything is trained."""

    folder: Path
    model: CausalLM
    backend: Backend
    strategy: ChosenStrategy
    new_rows: list[int]
    """Rows of the embedding that are new, or that new tokens have; they are trained, too."""
    adapter: Path | None
    """The PEFT folder that is trained further; None for a new adapter."""


def load_base(config: Config, folder: Path, backend: Backend, world: World, *, rows: NewRows, adapter: Path | None, say: Say) -> BaseModel:
    """Load the base in `folder` and choose the strategy; the embedding gets the rows of `adapter`, and the new `rows`."""
    precision, method = backend.precision, config.training.method
    say(f"{backend.name} back end, {precision.products} products: {precision.reason}")
    strategy = _choose_strategy(config, folder, backend, world)
    if world.size > 1:
        each_pass = "; gradients are summed after every pass" if strategy.sums_each_pass else ""
        say(f"{strategy.strategy}: {strategy.reason}{each_pass}")
    weights = _weights_of(config, folder, world, say=say)
    keep = _keep_bytes(config, weights, backend, strategy, world)
    has_rows = adapter is not None and trained_rows(adapter) > 0
    mesh, device = _mesh_to_load(world, strategy, grows=has_rows or rows.needed > 0)
    model = load_model(weights, dtype=precision.storage, device=device, keep_bytes=keep, mesh=mesh)
    if adapter is not None or rows.needed:
        hold_tables(model)
    if adapter is not None:
        fit_rows(model, adapter, folder)
    before = model.get_input_embeddings().weight.shape[0]
    new_rows = make_rows(model, rows)
    if new_rows and adapter is not None:
        _refuse_more_rows(new_rows, adapter)
    if new_rows:
        refuse_lost_bias(model, folder, method=method)
        for line in describe_rows(model, before, new_rows, rows):
            say(line)
    if strategy.strategy != "replicate":
        whole = method == "lora" and bool(config.lora.modules_to_save)
        trains_rows = has_rows or bool(new_rows) or whole
        needs_whole = training.optimizer if (training := config.training).method == "full" and training.optimizer != "adamw" else None
        _refuse_sharded(packing_of(model).why_alone, trains_rows, needs_whole)
    return BaseModel(folder, model, backend, strategy, new_rows, adapter)


def _mesh_to_load(world: World, chosen: ChosenStrategy, *, grows: bool) -> tuple[Mesh | None, torch.device]:
    """The processes among which the rows of the weights are divided while they are loaded, and the device they are loaded to.

    No mesh if each process loads whole weights, also where the embedding may get rows.
    """
    if chosen.strategy == "replicate":
        return None, world.device
    if grows:
        return None, torch.device("cpu")  # sharded layer by layer from there
    return make_mesh(world, chosen.strategy), world.device


def _keep_bytes(config: Config, weights: Path, backend: Backend, strategy: ChosenStrategy, world: World) -> int | None:
    """Bytes of the base that stay in memory while it is loaded and tested, if it must be streamed; None if it is held.

    Only a single process streams, a frozen base, in the machine's memory. Raises OutOfMemory on all ranks if it can be neither.
    """
    if backend.free_bytes(1) is not None:
        return None
    dtype, free = backend.precision.storage, int(-world.max(-free_bytes(backend, world)))
    size = size_in(weights, dtype)
    problem = refuse_larger_than_memory(config, size, weights, dtype, strategy=strategy.strategy, world=world, free=free)
    if problem is not None:
        raise OutOfMemory(problem)
    if world.size > 1 or config.training.method != "lora":
        return None
    return free // 2 if must_stream(size.mapped, free_bytes=free) else None


def free_bytes(backend: Backend, world: World) -> int:
    """Memory that this process may use: its device's own, or its share of the machine's."""
    own = backend.free_bytes(world.local_size)
    return free_memory_bytes() // world.local_size if own is None else own


def _choose_strategy(config: Config, folder: Path, backend: Backend, world: World) -> ChosenStrategy:
    """The same on all ranks: what the rank with the least free memory allows."""
    if world.size == 1:
        return choose_strategy("replicate", method="", needed=0, free=0, world=world)
    method = config.training.method
    if config.model.quantization is not None:
        return ChosenStrategy("replicate", "quantised weights are kept whole on every process")
    needed = weight_bytes(count_weights(folder), method=method, storage=backend.precision.storage, optimizer=config.training.optimizer)
    free = int(-world.max(-free_bytes(backend, world)))
    return choose_strategy(config.distributed.strategy, method=method, needed=needed, free=free, world=world)


def _weights_of(config: Config, folder: Path, world: World, *, say: Say) -> Path:
    """The folder that is loaded: the base's own, or that of its quantised copy, which rank 0 writes before the others look for it.

    Machines that do not share a folder write one each, and two kinds of processors may round differently: that is refused on all ranks.
    """
    kind = config.model.quantization
    if kind is None:
        return folder
    if not world.is_main:
        world.barrier()
    found = quantized_base(folder, kind, say=say if world.is_main else lambda _: None)
    if world.is_main:
        world.barrier()
    require_agreement(world, {f"the quantised copy {as_typed(found)}": fingerprint(found)})
    expected_sizes(folder, kind, say=say)
    return found


def _refuse_more_rows(new_rows: Sequence[int], adapter: Path) -> None:
    """ConfigError, because an adapter that is trained further keeps its own rows."""
    message = f"the tokenizer needs {new_rows[-1] + 1:,} rows of the embedding, {len(new_rows):,} more than the adapter has"
    hint = f"llamahome export {as_typed(adapter)} --to merged, and --model with that folder"
    raise ConfigError(Problem(code="model.not-trainable-adapter", message=message, where="model.resize_embeddings", hint=hint))


def _refuse_sharded(why_alone: str | None, trains_rows: bool, optimizer: str | None) -> None:
    """ConfigError where weights cannot be sharded.

    All ranks gather sharded weights equally often, so each must have as many passes; and trained rows would be in a weight of which each
    rank holds a part.
    """
    why = f"documents of this model run one at a time: {why_alone}" if why_alone is not None else None
    if trains_rows:
        why = "rows of the embedding, or whole modules, are trained beside the adapters"
    if optimizer is not None:
        why = f"training.optimizer {optimizer} needs whole matrices"
    if why is not None:
        hint = "--set distributed.strategy=replicate"
        message = f"weights cannot be sharded, because {why}"
        raise ConfigError(Problem(code="distributed.cannot-shard", message=message, where="distributed.strategy", hint=hint))
