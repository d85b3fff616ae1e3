"""Rules across settings: pairs that contradict each other are errors, values that would be ignored are warnings.

What a single value may be is in schema.py. `origins` tells what somebody chose from what was left at its default: a default never
contradicts anything.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from llamahome.config.describe import settings
from llamahome.config.load import is_chosen
from llamahome.config.schema import Config
from llamahome.config.yamltext import write_value
from llamahome.errors import Problem

_LOOPBACK = ("127.", "localhost", "::1")


def check_config(config: Config, origins: Mapping[str, str]) -> list[Problem]:
    """Everything that keeps these settings from being obeyed together; empty when all is well."""
    return [*_data_errors(config, origins), *_training_errors(config, origins), *_machine_errors(config, origins)]


def config_warnings(config: Config, origins: Mapping[str, str]) -> list[Problem]:
    """Chosen settings that have no effect beside the others, each with the consequence."""
    ignored: dict[str, str] = {}
    if config.training.method == "full":
        reason = "training.method is full"
        ignored |= {key: reason for key in settings() if key.startswith("lora.")}
        ignored["model.dtype"] = "full fine-tuning keeps all weights in float32"
    if config.data.on_bad_row == "error":
        ignored["data.max_bad_share"] = "data.on_bad_row is error: the first bad row stops"
    if config.data.format == "text":
        ignored["model.chat_template"] = "data.format is text: there are no turns"
        if config.data.train_on != "all":
            ignored["data.train_on"] = "data.format is text: all tokens are learned"
    if _no_evaluation(config):
        reason = "no rows are held out (data.eval_split 0) and data.eval_path is not set"
        ignored |= dict.fromkeys(("evaluation.every", "evaluation.rows", "evaluation.sample_prompts", "checkpoint.keep_best"), reason)
    if config.distributed.most_nodes == 1:
        ignored["distributed.master_port"] = "one machine picks a free port itself"
    found = [_ignored(key, settings()[key].of(config), reason, origins) for key, reason in ignored.items() if is_chosen(origins[key])]
    return [*found, *_other_warnings(config, origins)]


def _data_errors(config: Config, origins: Mapping[str, str]) -> Iterator[Problem]:
    data = config.data
    if data.on_overlong == "split" and data.format not in ("auto", "text"):
        message = f"data.on_overlong split cuts plain text only, and data.format is {data.format}: a chat cut in two loses its question"
        yield _problem("config.split-needs-text", message, "data.on_overlong", origins, hint="--set data.on_overlong=truncate")
    if data.eval_path is not None and data.eval_split not in ("auto", 0) and is_chosen(origins["data.eval_split"]):
        message = f"data.eval_split {_show(data.eval_split)} holds rows out and data.eval_path {data.eval_path} brings its own; choose one"
        yield _problem("config.two-evaluations", message, "data.eval_split", origins, hint="--set data.eval_split=auto")
    if isinstance(data.eval_split, float) and data.eval_split > 1 and not data.eval_split.is_integer():
        message = f"data.eval_split {_show(data.eval_split)} is neither a share below 1 nor a whole count"
        yield _problem("config.share-or-count", message, "data.eval_split", origins, hint=f"--set data.eval_split={round(data.eval_split)}")


def _training_errors(config: Config, origins: Mapping[str, str]) -> Iterator[Problem]:
    training = config.training
    if training.warmup > 1 and not float(training.warmup).is_integer():
        message = f"training.warmup {_show(training.warmup)} is neither a share below 1 nor a whole count of steps"
        yield _problem("config.share-or-count", message, "training.warmup", origins, hint=f"--set training.warmup={round(training.warmup)}")
    elif training.max_steps is not None and training.warmup > training.max_steps:
        message = f"training.warmup takes {_show(training.warmup)} steps but training.max_steps ends the run after {training.max_steps}"
        hint = f"--set training.warmup={max(1, training.max_steps // 10) if training.max_steps > 1 else 0}"
        yield _problem("config.warmup-too-long", message, "training.warmup", origins, hint=hint)
    if training.method == "lora" and config.model.dtype == "bfloat16" and training.mixed_precision in ("no", False):
        message = "weights stored in bfloat16 are multiplied in bfloat16, but training.mixed_precision is no"
        yield _problem("config.two-precisions", message, "training.mixed_precision", origins, hint="--set model.dtype=float32")
    if training.method == "lora" and not config.lora.target_modules:
        message = "lora.target_modules names no layer: there would be nothing to train"
        yield _problem("config.nothing-to-train", message, "lora.target_modules", origins, hint="--set lora.target_modules=all-linear")
    if config.evaluation.early_stop_patience is not None and _no_evaluation(config):
        message = "evaluation.early_stop_patience watches the evaluation loss, but no rows are held out and data.eval_path is not set"
        yield _problem("config.nothing-to-watch", message, "evaluation.early_stop_patience", origins, hint="--set data.eval_split=auto")


def _machine_errors(config: Config, origins: Mapping[str, str]) -> Iterator[Problem]:
    machines = config.distributed
    if machines.node_rank >= machines.most_nodes:
        last = machines.most_nodes - 1
        allowed = "is 0" if last == 0 else f"goes from 0 to {last}"
        message = f"distributed.node_rank is {machines.node_rank}, but with {_nodes(machines.most_nodes)} it {allowed}"
        hint = f"--set distributed.node_rank={last}" if last else f"--set distributed.num_nodes={machines.node_rank + 1}"
        yield _problem("config.no-such-node", message, "distributed.node_rank", origins, hint=hint)
    size, nodes = machines.world_size, machines.most_nodes
    if isinstance(size, int) and size % nodes:
        below, above = size // nodes * nodes, (size // nodes + 1) * nodes
        sizes = f"{below} or {above}" if below else f"{above} or {2 * nodes}"
        message = f"distributed.world_size {size} cannot be shared evenly by {_nodes(nodes)}; {sizes} can"
        yield _problem(
            "config.uneven-world", message, "distributed.world_size", origins, hint=f"--set distributed.world_size={below or above}"
        )


def _other_warnings(config: Config, origins: Mapping[str, str]) -> Iterator[Problem]:
    machines, batch = config.distributed, config.training.batch_size
    if machines.most_nodes > 1 and not is_chosen(origins["distributed.master_addr"]):
        message = (
            f"distributed.master_addr is {machines.master_addr}, this machine alone: with {_nodes(machines.most_nodes)} the others wait"
        )
        yield _problem(
            "config.address-of-self", message, "distributed.master_addr", origins, hint="--set distributed.master_addr=ADDRESS of machine 0"
        )
    elif machines.most_nodes > 1 and machines.node_rank and machines.master_addr.startswith(_LOOPBACK):
        message = (
            f"distributed.master_addr {machines.master_addr} means this machine, but machine 0 is another (node_rank {machines.node_rank})"
        )
        yield _problem(
            "config.address-of-self", message, "distributed.master_addr", origins, hint="--set distributed.master_addr=ADDRESS of machine 0"
        )
    if isinstance(machines.world_size, int) and batch != "auto" and machines.world_size > batch:
        idle = machines.world_size - batch
        message = f"{machines.world_size} processes share training.batch_size {batch}: {idle} have nothing to do in each step"
        yield _problem(
            "config.idle-processes", message, "training.batch_size", origins, hint=f"--set training.batch_size={machines.world_size}"
        )


def _no_evaluation(config: Config) -> bool:
    return config.data.eval_split == 0 and config.data.eval_path is None


def _ignored(key: str, value: Any, reason: str, origins: Mapping[str, str]) -> Problem:
    return _problem(
        "config.no-effect", f"{key} {_show(value)} has no effect: {reason}", key, origins, hint=f"remove {key} from {origins[key]}"
    )


def _problem(code: str, message: str, key: str, origins: Mapping[str, str], *, hint: str) -> Problem:
    origin = origins[key]
    return Problem(code=code, message=message, where=origin if is_chosen(origin) else None, hint=hint)


def _nodes(count: int) -> str:
    return "1 machine" if count == 1 else f"{count} machines"


def _show(value: Any) -> str:
    return write_value(value)
