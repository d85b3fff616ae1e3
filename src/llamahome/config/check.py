"""Rules across settings: settings that contradict each other are errors, and settings without effect are warnings.

What a single value may be is in schema.py. `origins` tells which values a user chose, because a default never contradicts anything.
"""

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches

from llamahome.config.describe import settings
from llamahome.config.initial import FROM_WEIGHTS
from llamahome.config.learning import learning_errors
from llamahome.config.load import is_chosen, is_saved
from llamahome.config.no_effect import no_evaluation, reasons_for_no_effect
from llamahome.config.objectives import FORMAT_OF, LEARNS, WITHOUT_ANSWERS
from llamahome.config.preference import READ_BY, WITH_REFERENCE
from llamahome.config.schema import Config
from llamahome.config.yamltext import write_value
from llamahome.errors import Problem

METRICS = ("loss", "token_accuracy", "exact", "f1", "rouge", "json", "json_equal")
"""What evaluation.metric names besides a function of the user's."""
_LOOPBACK = ("127.", "localhost", "::1")

Finding = tuple[str, str, str, str]
"""(code, key, message, hint); the hint is what to type instead."""


def check_config(config: Config, origins: Mapping[str, str]) -> list[Problem]:
    """Every contradiction between these settings; empty if there is none."""
    chosen = {key for key, origin in origins.items() if is_chosen(origin)}
    learned = [*_objective_errors(config, chosen), *learning_errors(config), *_metric_errors(config), *_quantization_errors(config)]
    learned += [*_initial_errors(config), *_vera_errors(config)]
    return _problems([*_data_errors(config, chosen), *_training_errors(config), *learned, *_machine_errors(config)], origins)


def config_warnings(config: Config, origins: Mapping[str, str]) -> list[Problem]:
    """The chosen settings that have no effect, and settings that probably do not do what was meant; each says the consequence."""
    chosen = {key for key, origin in origins.items() if is_chosen(origin)}
    no_effect: list[Finding] = []
    for key, reason in reasons_for_no_effect(config).items():
        if key in chosen and not is_saved(origins[key]):  # the command that began the run has said it
            message = f"{key} {write_value(settings()[key].of(config))} has no effect: {reason}"
            own_option = origins[key].startswith("--") and origins[key] != "--set"
            hint = f"remove {origins[key]}" if own_option else f"remove {key} from {origins[key]}"
            no_effect.append(("config.no-effect", key, message, hint))
    return _problems([*no_effect, *_machine_warnings(config, chosen)], origins)


def _problems(findings: Iterable[Finding], origins: Mapping[str, str]) -> list[Problem]:
    return [
        Problem(code=code, message=message, where=origins[key] if is_chosen(origins[key]) else None, hint=hint)
        for code, key, message, hint in findings
    ]


def _data_errors(config: Config, chosen: set[str]) -> Iterator[Finding]:
    data, key, split = config.data, "data.eval_split", write_value(config.data.eval_split)
    if data.on_overlong == "split" and data.format not in ("auto", "text"):
        message = f"data.on_overlong split cuts plain text only, and data.format is {data.format}: a chat cut in two loses its question"
        yield "config.split-needs-text", "data.on_overlong", message, "--set data.on_overlong=truncate"
    if data.eval_path is not None and data.eval_split not in ("auto", 0) and key in chosen:
        message = f"data.eval_split {split} holds rows out and data.eval_path {data.eval_path} has its own rows; choose one"
        yield "config.two-evaluations", key, message, "--set data.eval_split=auto"
    if isinstance(data.eval_split, float) and data.eval_split > 1 and not data.eval_split.is_integer():
        message = f"data.eval_split {split} is neither a share below 1 nor a whole count"
        yield "config.share-or-count", key, message, f"--set data.eval_split={round(data.eval_split)}"


def _training_errors(config: Config) -> Iterator[Finding]:
    training, warmup = config.training, write_value(config.training.warmup)
    if training.warmup > 1 and not float(training.warmup).is_integer():
        message = f"training.warmup {warmup} is neither a share below 1 nor a whole count of steps"
        yield "config.share-or-count", "training.warmup", message, f"--set training.warmup={round(training.warmup)}"
    elif training.max_steps is not None and training.warmup > training.max_steps:
        message = f"training.warmup takes {warmup} steps but training.max_steps ends the run after {training.max_steps}"
        shorter = max(1, training.max_steps // 10) if training.max_steps > 1 else 0
        yield "config.warmup-too-long", "training.warmup", message, f"--set training.warmup={shorter}"
    if training.activation_offloading is True and training.gradient_checkpointing is False:
        message = "training.activation_offloading moves the inputs of recomputed layers, and training.gradient_checkpointing is false"
        yield "config.offload-needs-checkpointing", "training.activation_offloading", message, "--set training.gradient_checkpointing=true"
    if training.method == "lora" and config.model.dtype == "bfloat16" and training.mixed_precision in ("no", False):
        message = "weights stored in bfloat16 are multiplied in bfloat16, but training.mixed_precision is no"
        yield "config.two-precisions", "training.mixed_precision", message, "--set model.dtype=float32"
    if training.method == "lora" and config.model.dtype == "bfloat16" and training.mixed_precision == "fp16":
        message = "weights stored in bfloat16 are multiplied in bfloat16, but training.mixed_precision is fp16"
        yield "config.two-precisions", "training.mixed_precision", message, "--set model.dtype=auto"
    if training.method == "lora" and config.model.dtype == "float16" and training.mixed_precision != "fp16":
        message = "weights stored in float16 are multiplied in float16, with a loss scale, which training.mixed_precision fp16 asks for"
        yield "config.two-precisions", "model.dtype", message, "--set training.mixed_precision=fp16"
    if training.method == "lora" and not config.lora.target_modules:
        message = "lora.target_modules names no layer: there would be nothing to train"
        yield "config.nothing-to-train", "lora.target_modules", message, "--set lora.target_modules=all-linear"
    if training.method == "lora" and training.optimizer == "muon":
        message = (
            "training.optimizer muon is a rule for the matrices of full fine-tuning; adapters are two thin matrices whose product counts"
        )
        yield "config.muon-needs-full", "training.optimizer", message, "--set training.optimizer=adamw"
    if training.method == "full" and training.optimizer != "adamw" and config.distributed.strategy in ("shard", "hybrid"):
        message = f"training.optimizer {training.optimizer} needs whole weights, and distributed.strategy is {config.distributed.strategy}"
        yield "config.optimizer-needs-whole-weights", "training.optimizer", message, "--set training.optimizer=adamw"
    if config.evaluation.early_stop_patience is not None and no_evaluation(config):
        message = "evaluation.early_stop_patience watches the evaluations, but no rows are held out and data.eval_path is not set"
        yield "config.nothing-to-watch", "evaluation.early_stop_patience", message, "--set data.eval_split=auto"
    if config.output.final == "best" and no_evaluation(config):
        message = "output.final best takes the best evaluation, but no rows are held out and data.eval_path is not set"
        yield "config.nothing-to-watch", "output.final", message, "--set data.eval_split=auto"
    elif config.output.final == "best" and not config.checkpoint.keep_best:
        message = "output.final best needs the best checkpoint at the end, and checkpoint.keep_best 0 deletes it"
        yield "config.best-not-kept", "output.final", message, "--set checkpoint.keep_best=1"


def _metric_errors(config: Config) -> Iterator[Finding]:
    """A function of the user's is opened later, because its file is run."""
    key, name = "evaluation.metric", config.evaluation.metric
    if name not in METRICS and not name.endswith(".py") and ".py:" not in name:
        near = get_close_matches(name.lower(), METRICS, n=1) or ["loss"]
        message = f"there is no metric {name!r}; there are {', '.join(METRICS)}, and a function of yours as FILE.py:FUNCTION"
        yield "evaluation.unknown-metric", key, message, f"--set {key}={near[0]}"


def _objective_errors(config: Config, chosen: set[str]) -> Iterator[Finding]:
    objective, data_format, metric = config.training.objective, config.data.format, config.evaluation.metric
    learns, named = LEARNS[objective], {"labelled": "answers labelled good or bad"}
    fitting = FORMAT_OF.get(learns)
    special = data_format if data_format in (*FORMAT_OF.values(), *WITHOUT_ANSWERS.values()) else None
    if data_format != "auto" and special != fitting and (special is None or special != WITHOUT_ANSWERS.get(objective)):
        message = f"training.objective {objective} learns from {named.get(learns, learns)}, and data.format is {data_format}"
        yield "config.objective-and-format", "data.format", message, f"--set data.format={fitting or 'auto'}"
    for key, readers in READ_BY.items():
        if f"preference.{key}" in chosen and objective not in readers:
            message = f"preference.{key} is read by {', '.join(readers)}, and training.objective is {objective}"
            yield "config.not-of-objective", f"preference.{key}", message, f"--set training.objective={readers[0]}"
    if fitting and metric != "loss":
        message = f"evaluation.metric {metric} judges a good answer to a prompt, and training.objective {objective} learns from {learns}"
        message += " answers" * (learns == "labelled")
        yield "config.metric-of-answers", "evaluation.metric", message, "--set evaluation.metric=loss"
    if config.data.streaming is True and objective in WITH_REFERENCE:
        message = f"training.objective {objective} needs every row before training, for the log-probabilities of the reference"
        yield "config.reference-needs-rows", "data.streaming", message, "--set data.streaming=false"


def _quantization_errors(config: Config) -> Iterator[Finding]:
    kind, key = config.model.quantization, "model.quantization"
    if kind is None:
        return
    if config.training.method == "full":
        message = f"{key} {kind} keeps the weights of the base frozen in few bits, and training.method full trains them"
        yield "config.quantized-full", key, message, "--set training.method=lora"
    if config.distributed.strategy in ("shard", "hybrid"):
        message = f"{key} {kind} keeps the base whole on every process, and distributed.strategy is {config.distributed.strategy}"
        yield "config.quantized-sharded", key, message, "--set distributed.strategy=replicate"


def _initial_errors(config: Config) -> Iterator[Finding]:
    """lora.init that needs something else of the settings."""
    init, kind, key = config.lora.init, config.model.quantization, "lora.init"
    if config.training.method != "lora" or config.model.adapter is not None:
        return
    if init == "eva":
        yield from _eva_errors(config)
    odd = [rank for rank in (config.lora.rank, *config.lora.rank_pattern.values()) if rank % 2]
    if init == "orthogonal" and odd:
        message = f"lora.init orthogonal takes half of a rank for A and half for B, and {odd[0]} is odd"
        yield "config.lora-init", key, message, f"--set lora.rank={config.lora.rank + config.lora.rank % 2}, or --set lora.init=default"
    if init not in FROM_WEIGHTS:
        return
    if config.lora.use_dora:
        message = f"lora.init {init} begins with a product that is not zero, and DoRA would take its length for that of the base's weights"
        yield "config.lora-init", key, message, "--set lora.use_dora=false, or --set lora.init=default"
    if init == "loftq" and kind is None:
        message = "lora.init loftq begins with the error of quantisation, and model.quantization is not set"
        yield "config.lora-init", key, message, "--set model.quantization=nf4"
    elif init != "loftq" and kind is not None:
        message = f"lora.init {init} decomposes weights in 16 or 32 bits, and model.quantization is {kind}"
        yield "config.lora-init", key, message, "--set lora.init=loftq"


def _vera_errors(config: Config) -> Iterator[Finding]:
    """What PEFT's VeRA does not have."""
    lora, model = config.lora, config.model
    if config.training.method != "lora" or not lora.use_vera:
        return
    reasons = {
        "lora.use_dora": (lora.use_dora, "has no lengths of rows to train", "false"),
        "lora.use_rslora": (lora.use_rslora, "has no scale by alpha and rank", "false"),
        "lora.init": (lora.init != "default" and model.adapter is None, "draws its matrices at random and trains only vectors", "default"),
        "lora.plus_ratio": (lora.plus_ratio != 1.0, "trains no B matrix, whose rate this is", "1"),
        "lora.rank_pattern": (lora.rank_pattern, "has two matrices for all layers, so all ranks are equal", "{}"),
        "lora.alpha_pattern": (lora.alpha_pattern, "has no scale by alpha and rank", "{}"),
        "model.new_tokens": (model.new_tokens, "trains no single rows of the embedding in PEFT", "[]"),
        "model.resize_embeddings": (model.resize_embeddings, "trains no single rows of the embedding in PEFT", "false"),
    }
    for key, (refused, why, instead) in reasons.items():
        if refused:
            message = f"lora.use_vera {why}, and {key} is {write_value(settings()[key].of(config))}"
            yield "config.lora-vera", key, message, f"--set {key}={instead}, or --set lora.use_vera=false"


def _eva_errors(config: Config) -> Iterator[Finding]:
    """What does not go together with ranks that rows decide when a run begins."""
    strategy, default = config.distributed.strategy, "--set lora.init=default"
    reasons = [
        (
            config.lora.rank_pattern or config.lora.alpha_pattern,
            "shares out the ranks itself, and lora.rank_pattern or lora.alpha_pattern is set",
            "--set lora.rank_pattern={} --set lora.alpha_pattern={}",
        ),
        (
            config.model.new_tokens or config.model.resize_embeddings,
            "runs the base over rows before it trains, when new rows of the embedding mean nothing yet",
            default,
        ),
        (
            config.training.objective == "grpo",
            "looks at the targets of rows, and training.objective grpo has none before it draws answers",
            default,
        ),
        (
            strategy in ("shard", "hybrid"),
            f"runs the whole base on one process, and distributed.strategy is {strategy}",
            "--set distributed.strategy=replicate",
        ),
    ]
    for refused, why, hint in reasons:
        if refused:
            yield "config.lora-init", "lora.init", f"lora.init eva {why}", hint


def _machine_errors(config: Config) -> Iterator[Finding]:
    rank, size, nodes = config.distributed.node_rank, config.distributed.world_size, config.distributed.most_nodes
    if rank >= nodes:
        message = f"distributed.node_rank is {rank}, but with {_machines(nodes)} it " + (
            f"goes from 0 to {nodes - 1}" if nodes > 1 else "is 0"
        )
        hint = f"--set distributed.node_rank={nodes - 1}" if nodes > 1 else f"--set distributed.num_nodes={rank + 1}"
        yield "config.no-such-node", "distributed.node_rank", message, hint
    if isinstance(size, int) and size % nodes:
        sizes = [multiple for multiple in (size // nodes * nodes, (size // nodes + 1) * nodes, 2 * nodes) if multiple]
        message = f"distributed.world_size {size} cannot be shared evenly by {_machines(nodes)}; {sizes[0]} or {sizes[1]} can"
        yield "config.uneven-world", "distributed.world_size", message, f"--set distributed.world_size={sizes[0]}"


def _machine_warnings(config: Config, chosen: set[str]) -> Iterator[Finding]:
    machines, batch, address = config.distributed, config.training.batch_size, config.distributed.master_addr
    key, hint = "distributed.master_addr", "--set distributed.master_addr=ADDRESS of machine 0"
    if machines.most_nodes > 1 and key not in chosen:
        message = f"{key} is {address}, this machine alone: with {_machines(machines.most_nodes)} the others wait"
        yield "config.address-of-self", key, message, hint
    elif machines.most_nodes > 1 and machines.node_rank and address.startswith(_LOOPBACK):
        message = f"{key} {address} means this machine, but machine 0 is another (node_rank {machines.node_rank})"
        yield "config.address-of-self", key, message, hint
    if isinstance(machines.world_size, int) and batch != "auto" and machines.world_size > batch:
        idle = machines.world_size - batch
        message = f"{machines.world_size} processes share training.batch_size {batch}: {idle} have nothing to do in each step"
        yield "config.idle-processes", "training.batch_size", message, f"--set training.batch_size={machines.world_size}"


def _machines(count: int) -> str:
    return "1 machine" if count == 1 else f"{count} machines"
