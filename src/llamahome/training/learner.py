"""The model that is trained: what is trained is added to the base (loaded_model.py), and the weights are placed on the ranks."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from llamahome.config.schema import Config
from llamahome.data.records import Microbatch
from llamahome.distributed.processors import return_freed_memory
from llamahome.distributed.world import World
from llamahome.model.adapter import SavedModel
from llamahome.model.adapter_coverage import coverage_lines
from llamahome.model.backends.choose import unused_gpu_note
from llamahome.model.fingerprints import fingerprint
from llamahome.model.load import CausalLM, decoder_layers
from llamahome.model.lora import add_lora, load_lora
from llamahome.model.lora_choice import shares_weight
from llamahome.model.lora_init import start_adapters
from llamahome.model.lora_vera import shared_products
from llamahome.model.objective import Objective
from llamahome.model.offload import offload_inputs
from llamahome.model.packing import packing_of
from llamahome.model.place import place, trained_parameters
from llamahome.model.recompute import tile_blocks
from llamahome.model.shard import Placement, replicated, sharded
from llamahome.model.stored_weights import unused_note
from llamahome.model.stream import held_bytes
from llamahome.monitoring.resources import free_memory_bytes, memory_limit_bytes
from llamahome.monitoring.throughput import model_flops_per_token
from llamahome.training.loaded_model import BaseModel, Say
from llamahome.training.memory_watch import MemoryWatch
from llamahome.training.objective import TrainingObjective, choose_objective
from llamahome.training.optimizer import make_optimizer


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


def make_learner(
    config: Config, base: BaseModel, world: World, *, auxiliary: Path, begins: bool = True, rows: float, tokens: float, say: Say
) -> Learner:
    """Add what is trained, compile and place the model; `rows` and `tokens` are still to be trained on. Changes the model of `base`.

    The files in `auxiliary` are saved with the model. If the run does not begin here, its weights are restored afterwards.
    """
    model, backend, training = base.model, base.backend, config.training
    passes = packing_of(model).remarks(documents=rows, passes=tokens / backend.micro_batch_tokens)
    for line in (unused_gpu_note(config, world.device), unused_note(model), *backend.performance_notes(model), *passes):
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
        if training.activation_offloading is True:
            _offload(base, say=say)
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


def _offload(base: BaseModel, *, say: Say) -> None:
    store = base.backend.offload_store()
    if isinstance(store, str):
        say(f"activation offloading off: {store}")
    elif offload_inputs(base.model, store) is None:
        say("activation offloading off: the layers of this model cannot be recomputed one by one")


def _tables(model: CausalLM, placement: Placement) -> set[str]:
    """Names of the trained embeddings and of the output head."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    tables.add(id(model.get_output_embeddings().weight))
    return {name for name, weight in placement.parameters.items() if id(weight) in tables}


def flops_per_token(model: CausalLM, target_share: float) -> float:
    """Floating-point operations per trained token, from the shapes of the model."""
    head = model.get_output_embeddings().weight
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and p is not head and "embed" not in name]
    shared = shared_products(model)  # multiplied, and each layer's gradient with respect to its vectors is such a product
    return model_flops_per_token(
        matmul_weights=sum(p.numel() for p in matrices) + shared,
        trained_matmul_weights=sum(p.numel() for p in matrices if p.requires_grad) + shared,
        head_weights=head.numel(),
        head_is_trained=head.requires_grad,
        target_share=target_share,
    )


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
