"""Add LoRA adapters with PEFT, or load them.

PEFT creates the modules, their initial values and their names, so a saved adapter is a PEFT adapter. PEFT receives exact names
(model/targets.py), because its own `all-linear` includes routers and misses shared experts in some architectures.
Source: LoRA, arXiv 2106.09685.
"""

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils import get_peft_model_state_dict, load_peft_weights
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers as keys_as_loaded
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel

from llamahome.config.schema import LoraConfig
from llamahome.errors import ConfigError, Problem
from llamahome.model.lora_choice import cast_whole_modules, in_layers, require_patterns, require_whole, shares_weight
from llamahome.model.lora_layers import ADAPTER, use_own_forward
from llamahome.model.lora_vera import new_vera, require_vera
from llamahome.model.shard_load import local_of, stand_ins, whole_of
from llamahome.model.targets import ChosenTargets, choose, shortest_suffixes
from llamahome.model.vocabulary import cast_trained_rows, trainable_token_indices
from llamahome.model.weightfiles import check_adapter_file

_SIZES = re.compile(r"size mismatch for (\S+): copying a param with shape torch.Size\((\S.*?)\) .*? current model is torch.Size\((.*?)\)")
BY_PEFT = ("gaussian", "orthogonal")
"""Values of lora.init that PEFT draws; lora_init.py computes the others from weights, after PEFT's default."""


def add_lora(model: PreTrainedModel, config: LoraConfig, *, base: str, seed: int, lean: bool, new_rows: Sequence[int] = ()) -> PeftModel:
    """Freeze `model`, add float32 adapters to the layers in `config.target_modules`, and return PEFT's wrapper.

    `base` is the base model's name in the saved adapter. Initial values depend on `seed` only. `lean` uses our forward for plain layers;
    it computes in the dtype of the weights, without autocast. `new_rows` of embedding and head are trained, too. Raises ConfigError if a
    name selects no layer, if PEFT supports no dropout, DoRA or VeRA for a selected layer, or if PEFT could not load any of the adapters.
    """
    chosen = chosen_targets(model, config)
    require_patterns(model, "rank_pattern", config.rank_pattern, chosen)
    require_patterns(model, "alpha_pattern", config.alpha_pattern, chosen)
    require_whole(model, config.modules_to_save, chosen, new_rows)
    modules, parameters = _peft_names(model, chosen, config)
    if config.use_vera:
        require_vera(model, parameters, config)
        settings: PeftConfig = new_vera(model, modules, config, seed=seed)
    else:
        settings = _new_lora(model, modules, parameters, config, new_rows)
    model.name_or_path = base  # PEFT writes it into the adapter's config
    with torch.random.fork_rng(devices=[]), quiet_peft(), stand_ins(model):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, settings)
    if config.use_dora:
        _take_lengths(adapted)
    cast_trained_rows(adapted)
    cast_whole_modules(adapted)
    if lean:
        use_own_forward(adapted)
    return adapted


def _new_lora(
    model: PreTrainedModel, modules: list[str], parameters: list[str], config: LoraConfig, new_rows: Sequence[int]
) -> PeftLoraConfig:
    return PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        trainable_token_indices=trainable_token_indices(model, new_rows),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        modules_to_save=list(config.modules_to_save) or None,
        ensure_weight_tying=shares_weight(model, config.modules_to_save),
        init_lora_weights=config.init if config.init in BY_PEFT else True,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),  # GPT-2's linear layer
    )


@torch.no_grad()
def _take_lengths(adapted: PeftModel) -> None:
    """Let the magnitudes of DoRA begin with the lengths of weights of which each process has rows; each is whole for a moment."""
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer) and local_of(weight := layer.get_base_layer().weight) is not weight:
            whole_OI = whole_of(weight).float()
            lengths_O = torch.linalg.norm(whole_OI.t() if layer.fan_in_fan_out else whole_OI, dim=1)
            layer.lora_magnitude_vector[ADAPTER].weight.copy_(lengths_O)


def chosen_targets(model: PreTrainedModel, config: LoraConfig) -> ChosenTargets:
    """The weights of a base that get adapters. Raises ConfigError as `add_lora` does."""
    return in_layers(model, _loadable(model, choose(model, config.target_modules)), config.layers)


def load_lora(model: PreTrainedModel, folder: Path, *, base: str, dropout: float, lean: bool) -> PeftModel:
    """Freeze `model`, add the adapter in `folder` with its own ranks and layers to train it further, and return PEFT's wrapper.

    `base` is the base model's name in the saved adapter, and `dropout` that of this run. Values are float32, as add_lora's. Raises
    ConfigError when the adapter does not fit to the model or holds weights that PEFT does not use.
    """
    check_adapter_file(folder)
    try:
        settings = PeftConfig.from_pretrained(str(folder))
        setattr(settings, "lora_dropout" if isinstance(settings, PeftLoraConfig) else "vera_dropout", dropout)
        settings.base_model_name_or_path = base
        with quiet_peft(), stand_ins(model), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True, config=settings)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, UserWarning) as error:
        raise ConfigError(does_not_fit(folder, error)) from error
    model.name_or_path = base
    _require_all_used(adapted, folder)
    cast_trained_rows(adapted)
    cast_whole_modules(adapted)
    if lean:
        use_own_forward(adapted)
    return adapted


def _require_all_used(adapted: PeftModel, folder: Path) -> None:
    """Raise ConfigError if PEFT has left out weights of the adapter, as it does for layers that the base lacks.

    Names of single experts may be stacked when they are loaded, so they are not compared.
    """
    unused = load_peft_weights(str(folder), device="cpu").keys() - get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    if lost := sorted(name for name in unused if "expert" not in name):
        message = f"the adapter does not fit to this base: {len(lost)} of its weights have no layer here, for example {lost[0]}"
        raise ConfigError(Problem(code="model.weights-do-not-fit", message=message, where=str(folder)))


def does_not_fit(folder: Path, error: Exception) -> Problem:
    """The problem that PEFT cannot load an adapter, with both shapes if these are the reason."""
    text = " ".join(str(error).split())
    if sizes := _SIZES.search(text):
        message = f"the adapter does not fit to this base: {sizes[1]} has {sizes[2]} in the adapter, and {sizes[3]} here"
        return Problem(code="model.weights-do-not-fit", message=message, where=str(folder))
    return Problem(code="model.unreadable", message=f"PEFT cannot load it: {text[:300]}", where=str(folder))


def _loadable(model: PreTrainedModel, chosen: ChosenTargets) -> ChosenTargets:
    """`chosen` without the layers whose adapters PEFT would not load; logs a warning, or raises ConfigError if no layer is left.

    When PEFT loads an adapter, it renames the keys as transformers renames the weights of the model family, and ignores keys that then
    match nothing: if `x.weight_proj` becomes `x.weight_proj.weight`, so does `x.weight_proj.lora_A.weight` (Inkling2, transformers 5.23).
    """
    saved = {f"base_model.model.{path}.lora_{side}.weight": torch.empty((1, 1), device="meta") for path in chosen.modules for side in "AB"}
    loaded = keys_as_loaded(model, PeftLoraConfig(target_modules=chosen.modules), saved)
    lost = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in saved.keys() - loaded.keys()}
    if not lost:
        return chosen
    kinds = ", ".join(sorted({path.rpartition(".")[2] for path in lost}))
    message = f"PEFT cannot load an adapter of {kinds} in {type(model).__name__}, because transformers renames its weights"
    kept = ChosenTargets([path for path in chosen.modules if path not in lost], chosen.parameters)
    if not kept.modules and not kept.parameters:
        hint = "--set lora.target_modules=all-linear"
        raise ConfigError(Problem(code="lora.not-loadable", message=message, where="lora.target_modules", hint=hint))
    logging.getLogger(__name__).warning("%s; %d layers get no adapter", message, len(lost))
    return kept


def _peft_names(model: PreTrainedModel, chosen: ChosenTargets, config: LoraConfig) -> tuple[list[str], list[str]]:
    """Names for PEFT's target_modules and target_parameters that select exactly the `chosen` paths, now and when PEFT loads them."""
    modules = shortest_suffixes(chosen.modules, [path for path, _ in model.named_modules()])
    renamed = {name for name in modules if _is_renamed(model, name)}
    modules = [name for name in modules if name not in renamed]
    as_weights = [f"{path}.weight" for path in chosen.modules if any(path == name or path.endswith("." + name) for name in renamed)]
    weights = [path for path, _ in model.named_parameters()]
    parameters = shortest_suffixes([*chosen.parameters, *as_weights], weights, least=2)
    if parameters and (config.dropout or config.use_dora):
        raise ConfigError(_no_dropout_or_dora(model, parameters, config))
    return modules, parameters


def _is_renamed(model: PreTrainedModel, name: str) -> bool:
    """Whether PEFT takes `name` for single experts of an older transformers version and would adapt stacked experts instead.

    PEFT does so when it creates and when it loads an adapter, but only for names of layers, not for names of parameters.
    """
    settings = PeftLoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(settings, model=model, conversions=None)
    except ValueError:  # PEFT requires a second name beside this one
        return True
    return set(settings.target_modules) != {name}


def _no_dropout_or_dora(model: PreTrainedModel, parameters: Sequence[str], config: LoraConfig) -> Problem:
    what, setting = ("dropout", "lora.dropout=0") if config.dropout else ("DoRA", "lora.use_dora=false")
    names = ", ".join(name.removesuffix(".weight") for name in parameters)
    message = f"in {type(model).__name__} PEFT adapts {names} as parameters, where {what} does not work"
    hint = "--set lora.dropout=0 --set lora.use_dora=false" if config.dropout and config.use_dora else f"--set {setting}"
    return Problem(code="lora.not-plain", message=message, where=f"lora.{'dropout' if config.dropout else 'use_dora'}", hint=hint)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide a deprecation warning that PEFT 0.21 causes, because it reads a property of transformers by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield
