"""The parts of a run and how each is made from the settings: learner, plan, evaluation. No numerics, no order of events.

pipeline.py says which part comes when. Every `auto` is resolved here and written back into the settings with the reason as its origin.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llamahome.config.load import LoadedConfig, with_values
from llamahome.data.prepare import Prepared
from llamahome.data.records import Microbatch
from llamahome.data.steps.loader import Extent, sequential_microbatches
from llamahome.data.store.table import ExampleTable
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.data_limits import refuse_sharded
from llamahome.distributed.world import World
from llamahome.errors import ConfigError, Problem
from llamahome.model.adapted import account
from llamahome.model.adapter import SavedModel, fingerprint
from llamahome.model.backends.backend import Backend
from llamahome.model.backends.choose import overlooked
from llamahome.model.load import CausalLM, load_model
from llamahome.model.lora import add_lora
from llamahome.model.objective import Objective
from llamahome.model.packing import packing_of
from llamahome.model.place import largest_pass, needs_checkpointing, place, trained_parameters
from llamahome.model.shard import Placement, replicated, sharded
from llamahome.model.strategy import Chosen, choose_strategy, count_weights, weight_bytes
from llamahome.model.targets import copied_bytes
from llamahome.model.vocabulary import grow_embeddings, refuse_lost_bias
from llamahome.monitoring.progress import Progress
from llamahome.monitoring.resources import free_memory_bytes
from llamahome.monitoring.throughput import model_flops_per_token
from llamahome.training.optimizer import auto_learning_rate, make_optimizer
from llamahome.training.stop import StopRequest
from llamahome.units import show_bytes


@dataclass(frozen=True)
class Session:
    """What lives as long as the command."""

    world: World
    progress: Progress
    stop: StopRequest
    closing: ExitStack
    """What is closed when the command ends."""


@dataclass(frozen=True)
class Job:
    """What is trained on what, before the first step."""

    data_paths: tuple[str, ...]
    loaded: LoadedConfig
    prepared: Prepared
    tokenizer: ChatTokenizer
    base: Path
    backend: Backend
    """What computes."""
    start: int = 0
    """Position in the data at which this process begins."""


@dataclass(frozen=True)
class Learner:
    """The model and everything that belongs to its weights."""

    model: CausalLM
    """The causal language model, adapters inside."""
    saved: SavedModel
    """What is written to disk: the adapter's wrapper, or the model itself."""
    base: Path
    objective: Objective
    placement: Placement
    parameters: dict[str, nn.Parameter]
    """What this process updates."""
    optimizer: torch.optim.AdamW
    trained_share: float
    base_fingerprint: str


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run."""

    horizon: int
    positions: int
    steps_per_epoch: float
    rows_ahead: int
    """Rows that are still to be trained on."""


def make_plan(loaded: LoadedConfig, rows: int, *, step: int = 0, consumed: int = 0) -> Plan:
    """Steps and rows of the whole run when an epoch has `rows`, of which `step` updates over `consumed` rows are done.

    What is done counts as it was: a resumed run may have another batch size, and still ends at max_steps or after its epochs.
    """
    training = loaded.config.training
    epochs, batch = float(training.epochs), int(training.batch_size)  # amounts.py has resolved them
    extent = Extent(epochs=epochs, batch_size=batch, max_steps=training.max_steps, step=step, consumed=consumed)
    positions = extent.positions(rows)
    return Plan(extent.horizon(rows), positions, rows / batch, max(0, positions - consumed))


def load_learner(loaded: LoadedConfig, job: Job, plan: Plan, world: World, *, say: Callable[[str], None]) -> tuple[Learner, LoadedConfig]:
    """Load the base, add what is trained, place it; returns the settings with everything that depends on the model resolved."""
    config, base, backend = loaded.config, job.base, job.backend
    precision = backend.precision
    say(f"{backend.name} back end, {'bf16' if precision.compute == torch.bfloat16 else 'float32'} products: {precision.reason}")
    chosen = _choose_placement(loaded, base, backend, world)
    if config.distributed.strategy == "auto":
        loaded = with_values(loaded, {"distributed.strategy": chosen.strategy}, origin=f"auto: {chosen.reason}")
    if world.size > 1:
        say(f"{chosen.strategy}: {chosen.reason}" + ("; gradients are summed after every pass" if chosen.sums_each_pass else ""))
    first_place = world.device if chosen.strategy == "replicate" else torch.device("cpu")  # from where it is dealt out layer by layer
    model = load_model(base, dtype=precision.storage, device=first_place)
    grown = max(job.tokenizer.vocabulary.values()) + 1 if config.model.resize_embeddings else 0
    new_rows = grow_embeddings(model, grown)
    if new_rows:
        refuse_lost_bias(model, base, method=config.training.method)
        say(f"the embedding grows by {len(new_rows):,} rows to {new_rows.stop:,}; they begin as the mean of the others and are trained")
    tokens = plan.rows_ahead * job.prepared.report.tokens_per_row
    packing = packing_of(model).remarks(documents=plan.rows_ahead, passes=tokens / backend.micro_batch_tokens)
    for line in (overlooked(config, world.device), *backend.remarks(model), *packing):
        if line is not None:
            say(line)
    if chosen.strategy != "replicate":
        refuse_sharded(packing_of(model).why_alone, new_rows)
    else:
        loaded = leave_short_runs(loaded, base, backend, world, tokens=tokens, say=say)
    loaded = _resolve(loaded, model, backend, world)
    if config.training.gradient_checkpointing == "auto":
        found = "on" if loaded.config.training.gradient_checkpointing else "off"
        say(f"gradient checkpointing {found}: {loaded.origins['training.gradient_checkpointing'].removeprefix('auto: ')}")
    config = loaded.config
    saved: SavedModel = model
    if config.training.method == "lora":
        name = str(base.resolve()) if Path(config.model.name).is_dir() or base.parts[:1] == ("data",) else config.model.name
        saved = add_lora(model, config.lora, base=name, seed=config.training.seed, lean=not precision.autocast, new_rows=new_rows)
        for line in account(model):
            say(line)
    checkpointing = config.training.gradient_checkpointing is True
    for line in place(model, world=world, checkpointing=checkpointing, sync_batch_norm=config.distributed.sync_batch_norm):
        say(line)
    trained = sum(p.numel() for p in trained_parameters(model).values())
    strategy = chosen.strategy
    loaded = _compile(loaded, model, backend, whole=strategy == "replicate", world=world, say=say)
    if strategy == "replicate":
        placement = replicated(model, world)
    else:
        placement = sharded(model, world, strategy=strategy, precision=precision, sums_each_pass=chosen.sums_each_pass)
    learner = Learner(
        model=model,
        saved=saved,
        base=base,
        objective=Objective(model, backend, placement.within),
        placement=placement,
        parameters=placement.parameters,
        optimizer=make_optimizer(config.training.optimizer, placement.parameters, weight_decay=config.training.weight_decay),
        trained_share=trained / sum(p.numel() for p in model.parameters()),
        base_fingerprint=fingerprint(base),
    )
    return learner, loaded


def leave_short_runs(
    loaded: LoadedConfig, base: Path, backend: Backend, world: World, *, tokens: float, say: Callable[[str], None]
) -> LoadedConfig:
    """Turn training.compile auto off where a process would have to compile and `tokens` are too few to win that back.

    All ranks call it before anything that depends on the answer, and get the same one.
    """
    if loaded.config.training.compile != "auto":
        return loaded
    worth = backend.wins_back(tokens, weights=count_weights(base), processes=world.size)
    if not world.max(not worth):
        return loaded
    why = f"{round(tokens):,} tokens are too few to win back the time of compiling"
    say(f"training.compile: {why}; it trains without")
    return with_values(loaded, {"training.compile": False}, origin=f"auto: {why}")


def _compile(
    loaded: LoadedConfig, model: CausalLM, backend: Backend, *, whole: bool, world: World, say: Callable[[str], None]
) -> LoadedConfig:
    """Obey training.compile, the same on all processes; what it came to is kept, so that a resumed run computes the same bits."""
    wanted = loaded.config.training.compile
    if wanted is False:
        return loaded
    if wanted is True and not backend.compiles:
        message = f"the {backend.name} back end has nothing to compile"
        hint = "--set training.compile=auto"
        raise ConfigError(Problem(code="training.nothing-to-compile", message=message, where="training.compile", hint=hint))
    alone = "documents run one at a time" if packing_of(model).why_alone is not None else None
    why = alone or (backend.cannot_compile() if whole else "the weights are sharded")
    if world.max(why is not None):
        why = why or "another process cannot"
        if backend.compiles:
            say(f"training.compile: {why}; it trains without")
        return with_values(loaded, {"training.compile": False}, origin=f"auto: {why}")
    parts = backend.compile(model)
    if backend.compile_costs:
        say(f"training.compile: {parts} parts of the model; {backend.compile_costs}")
    if wanted == "auto":
        loaded = with_values(loaded, {"training.compile": True}, origin=f"auto: {parts} parts of the model run as compiled passes")
    return loaded


def _choose_placement(loaded: LoadedConfig, base: Path, backend: Backend, world: World) -> Chosen:
    """The same on all processes: what the one with the least free memory allows."""
    if world.size == 1:
        return choose_strategy("replicate", method="", needed=0, free=0, world=world)
    method = loaded.config.training.method
    needed = weight_bytes(count_weights(base), method=method, storage=backend.precision.storage)
    free = free_bytes(backend, world)
    return choose_strategy(loaded.config.distributed.strategy, method=method, needed=needed, free=int(-world.max(-free)), world=world)


def free_bytes(backend: Backend, world: World) -> int:
    """Memory that this process may fill: its device's own, or its share of the machine's."""
    own = backend.free_bytes(world.local_size)
    return free_memory_bytes() // world.local_size if own is None else own


def _resolve(loaded: LoadedConfig, model: CausalLM, backend: Backend, world: World) -> LoadedConfig:
    """Replace each `auto` that depends on machine or model by its value."""
    training, precision = loaded.config.training, backend.precision
    if training.learning_rate == "auto":
        width = model.get_output_embeddings().weight.shape[1]
        rate = auto_learning_rate(training.method, width)
        loaded = with_values(loaded, {"training.learning_rate": rate}, origin=f"auto: {training.method} at hidden size {width}")
    if loaded.config.model.dtype == "auto":
        stored = str(precision.storage).removeprefix("torch.")
        loaded = with_values(loaded, {"model.dtype": stored}, origin=f"auto: method {training.method}, {precision.reason}")
    free, longest = free_bytes(backend, world), loaded.config.data.max_length
    if training.method == "full":  # gradients and two moments are not there yet
        free -= 3 * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    whole = loaded.config.distributed.strategy == "replicate"
    compiled = training.compile is not False and whole and packing_of(model).why_alone is None

    copied = copied_bytes(model, loaded.config.lora.target_modules) if training.method == "lora" else 0

    def keeps(tokens: int) -> int:
        return copied + backend.kept_bytes(loaded.config, model, tokens, longest=longest, compiled=compiled)

    if training.micro_batch_tokens == "auto":
        tokens = backend.micro_batch_tokens
        if training.gradient_checkpointing is not True:
            tokens = largest_pass(tokens, fewest=max(backend.fewest_tokens, longest), keeps=keeps, free_bytes=free)
        tokens = int(-world.max(-tokens))
        loaded = with_values(loaded, {"training.micro_batch_tokens": tokens}, origin=f"auto: {backend.name} back end")
    if training.mixed_precision == "auto":
        loaded = with_values(loaded, {"training.mixed_precision": precision.name}, origin=f"auto: {precision.reason}")
    if training.gradient_checkpointing == "auto":
        tokens = max(int(loaded.config.training.micro_batch_tokens), longest)
        kept = keeps(tokens)
        wanted = needs_checkpointing(kept, free_bytes=free)
        origin = f"auto: activations of {tokens:,} tokens take about {show_bytes(kept)}, and {show_bytes(max(0, free))} are free"
        loaded = with_values(loaded, {"training.gradient_checkpointing": bool(world.max(wanted))}, origin=origin)
    return loaded


def flops_per_token(learner: Learner, target_share: float) -> float:
    """Floating-point operations that a token needs, from the shapes of the model."""
    head = learner.model.get_output_embeddings().weight
    matrices = [p for name, p in learner.model.named_parameters() if p.ndim == 2 and p is not head and "embed" not in name]
    trained = sum(p.numel() for p in matrices if p.requires_grad)
    return model_flops_per_token(
        matmul_weights=sum(p.numel() for p in matrices),
        trained_matmul_weights=trained,
        head_weights=head.numel(),
        head_is_trained=head.requires_grad,
        target_share=target_share,
    )


def evaluation_batches(
    table: ExampleTable, loaded: LoadedConfig, world: World, backend: Backend, *, equal_passes: bool = False
) -> list[Microbatch]:
    """The share of this rank in every example of `table`."""
    tokens = loaded.config.training.micro_batch_tokens
    budget = backend.micro_batch_tokens if tokens == "auto" else tokens
    place = {"rank": world.rank, "world_size": world.size}
    return sequential_microbatches(table, micro_batch_tokens=budget, equal_passes=equal_passes, deliver=backend.deliver, **place)
