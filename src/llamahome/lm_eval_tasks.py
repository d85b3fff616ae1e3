"""Hands a model over to lm-eval, EleutherAI's harness (the extra `eval`), with the model's chat template.

lm-eval loads the model itself, an adapter on its base, after llamahome has freed its own. No code of a task folder is run unless its YAML
names a Python function; what lm-eval downloads is up to the task, and HF_HUB_OFFLINE=1 forbids it.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamahome.config.load import LoadedConfig
from llamahome.conversation import quantization_of_run, typed_base
from llamahome.data.text.tokenizer_files import tokenizer_source
from llamahome.data.text.tokens import open_tokenizer
from llamahome.errors import ConfigError, MachineError, Problem
from llamahome.model.adapter_folder import find_base, is_adapter
from llamahome.model.backends.choose import choose_backend

_FAILURES = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, LookupError, AssertionError)
"""What lm-eval, and a task's YAML and data within it, raise."""


@dataclass(frozen=True)
class Tasks:
    """Tasks that lm-eval knows."""

    names: tuple[str, ...]
    manager: Any


def open_tasks(typed: Sequence[str]) -> Tasks:
    """Tasks by name, of lm-eval or, as `FOLDER:NAME` or `FILE.yaml`, of your own.

    Raises MachineError if lm-eval is not installed, ConfigError if there is no such task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        message = "tasks need lm-eval, which is not installed"
        raise MachineError(Problem(code="machine.needs-lm-eval", message=message, where="--tasks", hint="pip install 'llamahome[eval]'"))
    from lm_eval.tasks import TaskManager

    folders, names = [], []
    for each in (name.strip() for item in typed for name in item.split(",")):
        folder, colon, name = each.rpartition(":")
        if colon and Path(folder).is_dir():
            folders.append(folder)
            names.append(name)
        elif each.endswith((".yaml", ".yml")) and Path(each).is_file():
            names.append(str(Path(each).resolve()))
        elif each:
            names.append(each)
    try:
        manager = TaskManager(include_path=folders or None)
    except _FAILURES as error:
        raise ConfigError(_failed("lm-eval cannot read the tasks", error)) from error
    known = set(manager.all_tasks)
    if unknown := [name for name in names if name not in known and not name.endswith((".yaml", ".yml"))]:
        own = ", ".join(f"{folder}:NAME" for folder in folders)
        message = f"lm-eval has no task {unknown[0]!r}{f', nor is it in {own}' if own else ''}"
        raise ConfigError(Problem(code="evaluation.unknown-task", message=message, where="--tasks"))
    return Tasks(tuple(names), manager)


def run_tasks(tasks: Tasks, folder: Path, loaded: LoadedConfig, *, device: torch.device, say: Callable[[str], None]) -> dict[str, float]:
    """Each result of each task as `task/metric`, with a chat template if the model has one. Raises ConfigError if lm-eval fails."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    base = find_base(folder, typed=typed_base(loaded), say=say) if is_adapter(folder) else folder
    if (kind := quantization_of_run(folder, loaded)) is not None:
        say(f"the adapter was trained beside the base in {kind}; lm-eval computes it beside the base itself")
    chats = open_tokenizer(tokenizer_source(folder, loaded.config.model)).chat_template is not None
    if not chats:
        say("the model has no chat template, so tasks are asked as plain text")
    precision = choose_backend(loaded.config, device).precision
    try:
        model = HFLM(
            pretrained=str(base),
            peft=str(folder) if base != folder else None,
            tokenizer=str(folder),
            dtype=str(precision.storage).removeprefix("torch."),
            device=str(device),
            batch_size=8,
            trust_remote_code=False,
        )
        found: Any = simple_evaluate(
            model=model,
            tasks=list(tasks.names),
            task_manager=tasks.manager,
            apply_chat_template=chats,
            log_samples=False,
            bootstrap_iters=0,
        )
    except _FAILURES as error:
        raise ConfigError(_failed("lm-eval failed", error)) from error
    return dict(_results(found["results"]))


def _results(results: dict[str, dict[str, Any]]) -> list[tuple[str, float]]:
    """`task/metric`, with the filter behind it unless it is the default one; standard errors are left out."""
    found = []
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, int | float) and not metric.endswith("_stderr") and "," in key:
                found.append((f"{task}/{metric}" + (f",{filtered}" if filtered not in ("none", "") else ""), float(value)))
    return found


def _failed(what: str, error: BaseException) -> Problem:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return Problem(code="evaluation.task-failed", message=f"{what}: {type(error).__name__}: {first}", where="--tasks")
