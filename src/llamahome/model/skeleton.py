"""A model without its weights: read from a config alone, as deep as asked for, for plans.

Its weights have shapes and types and take no memory.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llamahome.errors import ConfigError, Problem
from llamahome.model.attention import ATTENTION_NAME, register_attention
from llamahome.model.limits import without_lost_padding
from llamahome.model.load import quiet_transformers
from llamahome.model.probe import never_packed
from llamahome.rundir import BASE_MODELS


def read_shape(name: str, known: Mapping[str, Mapping[str, Any]]) -> PreTrainedConfig:
    """The config of a model: a name in `known`, a config.json, a folder that holds one, or a name under data/models/base/.

    Nothing is fetched. Raises ConfigError when there is none, or it is not of a decoder with layers.
    """
    quiet_transformers()
    paths = [Path(name).expanduser(), Path(name).expanduser() / "config.json", BASE_MODELS / name / "config.json"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None and name.lower() in known:
        return AutoConfig.for_model(**known[name.lower()])
    if path is None:
        message = f"there is no config for {name!r}: neither a file or folder, nor one of {', '.join(known)}; nothing is fetched for a plan"
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"--model {near[0] if near else 'llama-3-8b'}, or a folder that holds its config.json"
        raise ConfigError(Problem(code="model.no-config", message=message, where="model.name", hint=hint))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        config = AutoConfig.for_model(**values)
        without_lost_padding(config)
        return config
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ConfigError(_unfit(path, f"it is not the config of a model that transformers knows: {first}")) from error


def require_layers(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """The same, or ConfigError: a plan is made from the size of layers and their number."""
    text = config.get_text_config()
    sizes = {key: getattr(text, key, None) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    absent = [key for key, value in sizes.items() if value is None]
    if absent:
        raise ConfigError(_unfit(Path(name), f"a plan is made from {', '.join(absent)}, which its config has not"))
    wrong = [f"{key} {value}" for key, value in sizes.items() if not isinstance(value, int) or value < 1]
    if wrong:
        raise ConfigError(_unfit(Path(name), f"its config gives no usable {', '.join(wrong)}"))
    return config


def _unfit(path: Path, why: str) -> Problem:
    return Problem(code="model.unplannable", message=why, where=str(path), hint="--model llama-3-8b, or another config.json")


def skeleton(config: PreTrainedConfig, *, layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this config with another number of layers, its weights on the meta device.

    ConfigError where documents of the model run one at a time because of its class or its config: how long that takes is not known.
    """
    register_attention()
    alone = never_packed(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)
    if alone is not None:
        why = f"documents of this model run one at a time, because {alone}"
        message = f"{why}; that cannot be planned; it can be trained by one process, or replicated"
        raise ConfigError(Problem(code="model.unplannable", message=message, where="model.name"))
    values = config.to_dict() | {"num_hidden_layers": layers}
    kinds = values.get("layer_types")
    if kinds:
        values["layer_types"] = [kinds[number % len(kinds)] for number in range(layers)]
    shallow = type(config).from_dict(values)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(shallow, dtype=dtype, attn_implementation=ATTENTION_NAME)
    return model


def pretend(model: nn.Module) -> None:
    """Give every weight and buffer a tensor of its shape and type on the CPU; inside a FakeTensorMode they take no memory."""
    made: dict[int, nn.Parameter] = {}  # a weight that two modules share stays one
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if id(weight) not in made:
                    made[id(weight)] = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), requires_grad=weight.requires_grad)
                module._parameters[name] = made[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def count_weights(model: nn.Module, head: nn.Parameter) -> dict[str, int]:
    """Weights of `model` by what they are for: frozen, trained, products and trained_products (without embeddings and `head`)."""
    every = list(model.named_parameters())
    matrices = [each for name, each in every if each.ndim == 2 and each is not head and "embed" not in name]
    return {
        "frozen": sum(each.numel() for _, each in every if not each.requires_grad),
        "trained": sum(each.numel() for _, each in every if each.requires_grad),
        "products": sum(each.numel() for each in matrices),
        "trained_products": sum(each.numel() for each in matrices if each.requires_grad),
    }
