"""`--from-adapter`: the adapter that a run trains further, and what it decides: the base, and rank, scale and layers of LoRA."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamahome.config.check import check_config
from llamahome.config.describe import settings
from llamahome.config.load import BY_ADAPTER, LoadedConfig, with_values
from llamahome.config.yamltext import write_value
from llamahome.conversation import model_folder, quantization_of_run, typed_base
from llamahome.errors import ConfigError, Problem
from llamahome.model.adapter_folder import base_of, is_adapter
from llamahome.rundir import as_typed, nearby

_TRAINED_ONLY = {"bias": "none", "layer_replication": None}
"""Fields of adapter_config.json and the values without which a run would not train what the adapter trained."""
_KINDS = ("LORA", "VERA")


def with_adapter(loaded: LoadedConfig, *, say: Callable[[str], None]) -> tuple[LoadedConfig, Path | None]:
    """The settings with what `model.adapter` decides, and the PEFT folder; None without an adapter.

    Raises ConfigError if there is no adapter, if it cannot be trained further, or if settings contradict it or each other with it.
    """
    target = loaded.config.model.adapter
    if target is None:
        return loaded, None
    try:
        folder = model_folder(target, loaded, say=say)
    except ConfigError as error:
        where = loaded.origins["model.adapter"]
        raise ConfigError([replace(each, where=where) if each.where == "MODEL" else each for each in error.problems]) from error
    if not is_adapter(folder):
        raise ConfigError(_refusal(folder, "it holds no adapter; a model is the base of a new run", hint=f"--model {as_typed(folder)}"))
    if loaded.config.training.method == "full":
        hint = f"llamahome export {as_typed(folder)} --to merged, and --model with that folder"
        raise ConfigError(_refusal(folder, "full training changes every weight, and an adapter is none", hint=hint))
    if loaded.config.model.new_tokens:
        hint = f"llamahome export {as_typed(folder)} --to merged, and --model with that folder; or --set model.new_tokens=[]"
        raise ConfigError(_refusal(folder, "model.new_tokens cannot be added to an adapter that is trained further", hint=hint))
    recorded = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    _refuse_untrainable(folder, recorded)
    decided = _decided(recorded, loaded, folder)
    changes = [f"{key} {write_value(old)} -> {write_value(decided[key])}" for key, old in _values(loaded, decided) if old != decided[key]]
    say(f"training goes on from the adapter {as_typed(folder)}" + (f": {', '.join(changes)}" if changes else ""))
    named = with_values(loaded, {"model.adapter": str(nearby(folder))}, origin=loaded.origins["model.adapter"])
    changed = {key: decided[key] for key, old in _values(loaded, decided) if old != decided[key] or not _is_typed(loaded.origins[key])}
    decided_by_both = with_values(named, changed, origin=f"{BY_ADAPTER}{folder}")
    if problems := check_config(decided_by_both.config, decided_by_both.origins):
        raise ConfigError(problems)
    return decided_by_both, folder


def _refuse_untrainable(folder: Path, recorded: dict[str, Any]) -> None:
    if (kind := recorded.get("peft_type")) not in _KINDS:
        raise ConfigError(_refusal(folder, f"it is of the kind {kind}; only LoRA and VeRA can be trained further"))
    if kind == "VERA" and not recorded.get("save_projection", True):
        hint = "save it again with save_projection=True in its VeraConfig"
        raise ConfigError(_refusal(folder, "it was saved without the matrices that its layers share", hint=hint))
    for field, wanted in _TRAINED_ONLY.items():
        if (value := recorded.get(field) or wanted) != wanted:
            hint = f"llamahome export {as_typed(folder)} --to merged, and --model with that folder"
            message = f"its adapter_config.json has {field} {json.dumps(value)}, and a run trains LoRA weights only"
            raise ConfigError(_refusal(folder, message, hint=hint))


def _decided(recorded: dict[str, Any], loaded: LoadedConfig, folder: Path) -> dict[str, Any]:
    """The settings that the adapter decides. Raises ConfigError with every typed one that contradicts."""
    layers = recorded.get("target_modules") or []
    names = layers if isinstance(layers, str) else sorted([*layers, *(recorded.get("target_parameters") or [])])
    decided = {
        "lora.rank": recorded["r"],
        "lora.target_modules": names,
        "lora.use_vera": recorded["peft_type"] == "VERA",
        "lora.use_rslora": bool(recorded.get("use_rslora")),
        "lora.use_dora": bool(recorded.get("use_dora")),
        "lora.layers": [],  # the names of the layers hold their numbers
        "lora.rank_pattern": recorded.get("rank_pattern") or {},
        "lora.alpha_pattern": {name: float(alpha) for name, alpha in (recorded.get("alpha_pattern") or {}).items()},
        "lora.modules_to_save": recorded.get("modules_to_save") or [],
    }
    if "lora_alpha" in recorded:
        decided["lora.alpha"] = float(recorded["lora_alpha"])
    problems = [
        Problem(
            code="model.adapter-differs",
            message=f"{key} is {write_value(old)}, and the adapter has {write_value(decided[key])}, which training on cannot change",
            where=loaded.origins[key],
            hint=f"leave {key} out; or train a new adapter on the merged model: llamahome export {as_typed(folder)} --to merged",
        )
        for key, old in _values(loaded, decided)
        if _is_typed(loaded.origins[key]) and not _same(old, decided[key])
    ]
    if problems:
        raise ConfigError(problems)
    if typed_base(loaded) is None:
        decided |= {"model.name": base_of(folder), "model.revision": recorded.get("revision")}
        if not _is_typed(loaded.origins["model.quantization"]) and (kind := quantization_of_run(folder, loaded)) is not None:
            decided["model.quantization"] = kind  # the adapter learned beside these numbers
    return decided


def _values(loaded: LoadedConfig, keys: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(key, settings()[key].of(loaded.config)) for key in keys]


def _same(typed: Any, recorded: Any) -> bool:
    return bool(sorted(typed) == sorted(recorded) if isinstance(typed, list) and isinstance(recorded, list) else typed == recorded)


def _is_typed(origin: str) -> bool:
    """Whether the value was typed for this run, and does not stand in a settings file for many."""
    return origin.startswith(("--", "LLAMAHOME_"))


def _refusal(folder: Path, message: str, *, hint: str | None = None) -> Problem:
    return Problem(code="model.not-trainable-adapter", message=message, where=str(folder), hint=hint)
