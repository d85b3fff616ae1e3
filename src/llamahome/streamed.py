"""How a run trains beside a frozen base that is larger than memory: its passes, what stays in memory, and what the user is told of it."""

from llamahome.config.initial import SUBTRACTED
from llamahome.config.load import LoadedConfig, is_chosen
from llamahome.config.optimizers import STATE_BYTES
from llamahome.config.schema import Config
from llamahome.data.report import DataReport
from llamahome.distributed.world import World
from llamahome.model.backends.backend import Backend
from llamahome.model.load import CausalLM
from llamahome.model.lora_vera import projection_numbers
from llamahome.model.packed_weight import packed_weights
from llamahome.model.stream import Stream
from llamahome.model.stream_choice import OTHER_FILES, Passes, Rates, StreamedBase, choose_passes
from llamahome.model.targets import choose
from llamahome.monitoring.resources import free_memory_bytes
from llamahome.monitoring.throughput import measured_peak_flops
from llamahome.pass_memory import PassMemory, Resolved, Say, documents_of_row, refuse_too_long
from llamahome.training.loaded_model import BaseModel, free_bytes
from llamahome.units import show_bytes, show_seconds

REACHED = 0.5
"""Share of the measured rate of one large product that a step reaches. measured: 635 tokens/s of LoRA on the starter, 0.34 TFLOP/s, beside
0.6 for the product (docs/log.md)."""

_SPARE = OTHER_FILES // 2
"""Memory that a forward pass leaves beside the base. With less, fewer layers stay in memory, because somebody else took what was theirs."""


def resolve_streamed(
    config: Config, base: BaseModel, stream: Stream, world: World, *, report: DataReport, compiled: bool, say: Say
) -> Resolved:
    """Micro-batches and gradient checkpointing of a run whose base is streamed; keeps as much of the base in memory as they leave room for.

    training.batch_size must be a number. Raises OutOfMemory if the longest row does not fit.
    """
    training, model, backend = config.training, base.model, base.backend
    free, memory = free_bytes(backend, world), PassMemory(config, base, compiled=compiled)
    moves = training.activation_offloading is True and not isinstance(memory.offload_place(), str)

    def needs(tokens: int, recomputes: bool) -> int:
        return memory.of_pass(tokens, recomputes=recomputes, offloads=moves, longest=min(tokens, config.data.max_length))

    sizes = StreamedBase(
        nbytes=stream.base_bytes,
        room_bytes=stream.room_bytes,
        kept_with=stream.kept_with,
        free_bytes=free - _beside(config, model, backend),
        needs=needs,
    )
    passes = choose_passes_of(config, sizes, _rates(model, backend, world, stream), report)
    row, room = min(report.longest_tokens, config.data.max_length) + _drawn(config), sizes.free_bytes - sizes.room_bytes
    refuse_too_long(memory, row, world, free=room, recomputes=passes.recomputes, offloads=moves)
    stream.keep(passes.keep_bytes)
    stream.watch(free_memory_bytes, spare=_SPARE, say=say)
    stream.batch_tokens = passes.tokens
    for line in describe(passes, sizes, stream.seconds_per_byte, free=free):
        say(line)
    why = f"a step in {passes.per_step:,} passes beside a base that is read in every pass"
    resolved = Resolved()
    if training.micro_batch_tokens == "auto":
        resolved["training.micro_batch_tokens"] = passes.tokens, why
    if training.gradient_checkpointing == "auto":
        resolved["training.gradient_checkpointing"] = passes.recomputes, why
    if moves is not training.activation_offloading:
        resolved["training.activation_offloading"] = False, "nothing is moved beside a base that is read from the disk"
    return resolved


def choose_passes_of(config: Config, sizes: StreamedBase, rates: Rates, report: DataReport) -> Passes:
    """The fastest passes that fit, for the settings and rows of a run."""
    training, tokens = config.training, report.tokens_per_row
    recomputes = training.activation_offloading is True or training.gradient_checkpointing
    longest = config.data.max_length if report.sampled_rows else min(config.data.max_length, report.longest_tokens)
    if training.objective == "grpo":  # the row is a prompt, and the passes are over the answers to it
        prompt = tokens * (1 - report.answer_share)
        tokens = config.grpo.group_size * (prompt + config.grpo.max_new_tokens)
    return choose_passes(
        sizes,
        rates,
        step_tokens=tokens * int(training.batch_size),
        longest=documents_of_row(config) * (longest + _drawn(config)),
        tokens=None if training.micro_batch_tokens == "auto" else training.micro_batch_tokens,
        recomputes=recomputes if isinstance(recomputes, bool) else None,
    )


def _drawn(config: Config) -> int:
    """Most tokens of an answer that the model draws itself; 0 where it learns from those in the rows."""
    return config.grpo.max_new_tokens if config.training.objective == "grpo" else 0


def describe(passes: Passes, sizes: StreamedBase, seconds_per_byte: float, *, free: int) -> list[str]:
    """What the user is told of a base that is streamed, in lines."""
    kept = sizes.nbytes - passes.read_bytes
    each = f"{show_bytes(passes.read_bytes)} of it are read twice"
    took = f", in about {show_seconds(2 * passes.read_bytes * seconds_per_byte)} while it computes" if seconds_per_byte else ""
    lines = [f"the base takes {show_bytes(sizes.nbytes)}, and {show_bytes(free)} are free: in each pass {each}{took}"]
    again = ", activations are computed again" if passes.recomputes else ""
    lines.append(
        f"a step is {passes.per_step:,} pass{'es' if passes.per_step > 1 else ''} of up to {passes.tokens:,} tokens{again}; "
        f"{show_bytes(kept)} of the base stay in memory"
    )
    return lines


def without_answers(loaded: LoadedConfig, *, say: Say) -> Resolved:
    """evaluation.sample_prompts 0 unless the user has set it, because every token of an answer reads the base."""
    if is_chosen(loaded.origins["evaluation.sample_prompts"]) or not loaded.config.evaluation.sample_prompts:
        return {}
    why = "every token of an answer would read the base once"
    say(f"evaluations show no sample answers, because {why}; --set evaluation.sample_prompts={loaded.config.evaluation.sample_prompts}")
    return {"evaluation.sample_prompts": (0, why)}


def _beside(config: Config, model: CausalLM, backend: Backend) -> int:
    """Bytes of what is trained with its gradients and optimizer, of the loss head, and of packed weights that are widened at once."""
    paths = choose(model, config.lora.target_modules).modules
    vera, frozen = config.lora.use_vera, projection_numbers(model, config.lora)
    sizes = [(config.lora.rank, model.get_submodule(path).weight.shape) for path in paths]
    adapters: int = sum(rank + rows if vera else rank * (rows + columns) for rank, (rows, columns) in sizes)
    whole = [module for path, module in model.named_modules() if path.rpartition(".")[2] in config.lora.modules_to_save]
    trained = adapters + sum({id(weight): weight.numel() for module in whole for weight in module.parameters()}.values())
    starts = 4 * (adapters if config.lora.init in SUBTRACTED else frozen)
    widened = 2 * max((weight.numel() for _, weight in packed_weights(model)), default=0) * backend.precision.compute.itemsize
    head = 2 * backend.tile_bytes(model.get_output_embeddings().weight.shape[0])
    return int(trained * (4 + 4 + STATE_BYTES[config.training.optimizer])) + starts + int(widened) + head


def _rates(model: CausalLM, backend: Backend, world: World, stream: Stream) -> Rates:
    """Of reading as it was measured while the model was tested, and of products now."""
    rows = model.get_input_embeddings().weight
    weights = sum(weight.numel() for weight in model.parameters() if weight is not rows or rows is model.get_output_embeddings().weight)
    peak = measured_peak_flops(world.device, backend.precision.compute)
    return Rates(stream.seconds_per_byte, 4.0 * weights / (REACHED * peak))
