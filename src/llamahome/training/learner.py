"""The model that is trained: the base is loaded, then what is trained is added, and the weights are placed on the ranks.

Between the two steps the settings that depend on the model are resolved (resolve.py).
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from llamahome.config.schema import Config
from llamahome.data.records import Microbatch
from llamahome.distributed.agreement import require_agreement
from llamahome.distributed.processors import return_freed_memory
from llamahome.distributed.world import World
from llamahome.errors import ConfigError, OutOfMemory, Problem
from llamahome.model.adapter import SavedModel, fit_rows, trained_rows
from llamahome.model.adapter_coverage import coverage_lines
from llamahome.model.backends.backend import Backend
from llamahome.model.backends.choose import unused_gpu_note
from llamahome.model.fingerprints import fingerprint
from llamahome.model.load import CausalLM, decoder_layers, load_model
from llamahome.model.lora import add_lora, load_lora
from llamahome.model.lora_choice import shares_weight
from llamahome.model.lora_init import start_adapters
from llamahome.model.objective import Objective
from llamahome.model.packing import packing_of
from llamahome.model.place import ChosenStrategy, choose_strategy, count_weights, place, trained_parameters, weight_bytes
from llamahome.model.quantize import sizes_of
from llamahome.model.quantized_copy import quantized_base
from llamahome.model.recompute import tile_blocks
from llamahome.model.shard import Placement, replicated, sharded
from llamahome.model.shard_load import Mesh, make_mesh
from llamahome.model.stream import held_bytes, hold_tables
from llamahome.model.stream_choice import must_stream
from llamahome.model.vocabulary import NewRows, describe_rows, make_rows, refuse_lost_bias
from llamahome.model.weights_size import refuse_larger_than_memory, size_in
from llamahome.monitoring.resources import free_memory_bytes, memory_limit_bytes
from llamahome.monitoring.throughput import model_flops_per_token
from llamahome.rundir import as_typed
from llamahome.training.memory_watch import MemoryWatch
from llamahome.training.objective import TrainingObjective, choose_objective
from llamahome.training.optimizer import make_optimizer

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


@dataclass(frozen=True)
class Learner:
    """The model and everything that belongs to its weights."""

    model: CausalLM
    """The causal language model, adapters inside."""
    saved: SavedModel
    """What is written to disk: the adapter's wrapper, or the model itself."""
    base: Path
    auxiliary: Path
    """The folder whose tokenizer, template and other files are saved with the model."""
    objective: TrainingObjective
    placement: Placement
    """Holds the parameters that this rank updates."""
    optimizer: torch.optim.Optimizer
    trained_share: float
    base_fingerprint: str

    @cached_property
    def watched_loss(self) -> Callable[[Microbatch], Tensor]:
        """The summed loss of a micro-batch; passes in the machine's memory end with MemoryError before the system ends the process."""
        if self.objective.backend.free_bytes(1) is not None:  # a device with memory of its own, which it refuses when it is full
            return self.objective.loss_sum
        held = held_bytes(self.model, processes=self.placement.exchange.world.local_size)
        watch = MemoryWatch(lambda: free_memory_bytes() - held, limit=memory_limit_bytes())
        return watch.around(self.objective.loss_sum, decoder_layers(self.model))


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
    mesh, device = _mesh_to_load(config, world, strategy, grows=has_rows or rows.needed > 0)
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


def _mesh_to_load(config: Config, world: World, chosen: ChosenStrategy, *, grows: bool) -> tuple[Mesh | None, torch.device]:
    """The processes among which the rows of the weights are divided while they are loaded, and the device they are loaded to.

    No mesh if each process loads whole weights, also for DoRA, which begins with their lengths, and where the embedding may get rows.
    """
    if chosen.strategy == "replicate":
        return None, world.device
    if (config.training.method == "lora" and config.lora.use_dora) or grows:
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


def make_learner(
    config: Config, base: BaseModel, world: World, *, auxiliary: Path, begins: bool = True, rows: float, tokens: float, say: Say
) -> Learner:
    """Add what is trained, compile and place the model; `rows` and `tokens` are still to be trained on. Changes the model of `base`.

    The files in `auxiliary` are saved with the model. If the run does not begin here, its weights are restored afterwards.
    """
    model, backend, training = base.model, base.backend, config.training
    passes = packing_of(model).remarks(documents=rows, passes=tokens / backend.micro_batch_tokens)
    for line in (unused_gpu_note(config, world.device), *backend.performance_notes(model), *passes):
        if line is not None:
            say(line)
    saved: SavedModel = model
    tied = training.method == "lora" and shares_weight(model, config.lora.modules_to_save)
    if training.method == "lora":
        lean = not backend.precision.autocast
        name = _base_name(config, base.folder)
        if base.adapter is not None:
            saved = load_lora(model, base.adapter, base=name, dropout=config.lora.dropout, lean=lean)
        else:
            saved = add_lora(model, config.lora, base=name, seed=training.seed, lean=lean, new_rows=base.new_rows)
            start_adapters(saved, config.lora, base.folder, seed=training.seed, world=world, compute=begins)
        for line in coverage_lines(model):
            say(line)
        if tied:
            say("lora.modules_to_save: embedding and output head share their weight, so both are trained, as one")
    checkpointing = training.gradient_checkpointing is True
    for line in place(model, world=world, checkpointing=checkpointing, sync_batch_norm=config.distributed.sync_batch_norm):
        say(line)
    trained = sum(parameter.numel() for parameter in trained_parameters(model).values())
    if training.compile is True:
        parts = backend.compile(model)
        if backend.compile_note:
            say(f"training.compile: {parts} parts of the model; {backend.compile_note}")
    if checkpointing:
        _spare_memory(base, compiled=training.compile is True)
    placement = _place_weights(base, world)
    return Learner(
        model=model,
        saved=saved,
        base=base.folder,
        auxiliary=auxiliary,
        objective=choose_objective(config, Objective(model, backend, placement.within)),
        placement=placement,
        optimizer=make_optimizer(
            training.optimizer,
            placement.parameters,
            weight_decay=training.weight_decay,
            plus_ratio=config.lora.plus_ratio if training.method == "lora" else 1.0,
            tables=_tables(model, placement),
        ),
        trained_share=trained / sum(parameter.numel() for parameter in model.parameters()),
        base_fingerprint=fingerprint(base.folder),
    )


def _spare_memory(base: BaseModel, *, compiled: bool) -> None:
    """What else makes long rows fit where layers are recomputed: feed-forward blocks in tiles, and freed memory that goes back at once."""
    if base.backend.free_bytes(1) is None:
        return_freed_memory(os.environ)
    tokens = base.backend.tile_tokens(compiled)
    if tokens is not None and base.strategy.strategy == "replicate":  # blocks of sharded weights run in the passes that all ranks agree on
        tile_blocks(base.model, tokens=tokens)


def _tables(model: CausalLM, placement: Placement) -> set[str]:
    """Names of the trained embeddings and of the output head."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    tables.add(id(model.get_output_embeddings().weight))
    return {name for name, weight in placement.parameters.items() if id(weight) in tables}


def free_bytes(backend: Backend, world: World) -> int:
    """Memory that this process may use: its device's own, or its share of the machine's."""
    own = backend.free_bytes(world.local_size)
    return free_memory_bytes() // world.local_size if own is None else own


def flops_per_token(model: CausalLM, target_share: float) -> float:
    """Floating-point operations per trained token, from the shapes of the model."""
    head = model.get_output_embeddings().weight
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and p is not head and "embed" not in name]
    return model_flops_per_token(
        matmul_weights=sum(p.numel() for p in matrices),
        trained_matmul_weights=sum(p.numel() for p in matrices if p.requires_grad),
        head_weights=head.numel(),
        head_is_trained=head.requires_grad,
        target_share=target_share,
    )


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
    say(sizes_of(folder, kind).line(kind))
    return found


def _place_weights(base: BaseModel, world: World) -> Placement:
    chosen = base.strategy
    if chosen.strategy == "replicate":
        return replicated(base.model, world)
    precision = base.backend.precision
    return sharded(base.model, world, strategy=chosen.strategy, precision=precision, sums_each_pass=chosen.sums_each_pass)


def _base_name(config: Config, folder: Path) -> str:
    """What an adapter names as its base: the folder where the base lies on this machine, or the name in the hub."""
    local = Path(config.model.name).is_dir() or folder.parts[:1] == ("data",)
    return str(folder.resolve()) if local else config.model.name


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
