"""Create a model without weights from its config, with any number of layers, for plans.

The weights have shapes and dtypes but take no memory.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llamahome.errors import ConfigError, Problem
from llamahome.model.attention import ATTENTION_NAME, register_attention
from llamahome.model.limits import remove_lost_ids
from llamahome.model.load import quiet_transformers
from llamahome.model.lora_vera import shared_products
from llamahome.model.probe import no_packing_reason, try_packing_without_weights
from llamahome.model.unsupported import first_line
from llamahome.rundir import BASE_MODELS


def read_shape(name: str, known: Mapping[str, Mapping[str, Any]]) -> PreTrainedConfig:
    """Read the config of a model: a name in `known`, a config.json, a folder with one, or a name under data/models/base/.

    Nothing is downloaded. Raises ConfigError if there is no config or transformers does not know it.
    """
    quiet_transformers()
    paths = [Path(name).expanduser(), Path(name).expanduser() / "config.json", BASE_MODELS / name / "config.json"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None and name.lower() in known:
        return AutoConfig.for_model(**known[name.lower()])
    if path is None:
        message = f"there is no config for {name!r}: it is no file or folder, and not one of {', '.join(known)}; a plan fetches nothing"
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"--model {near[0] if near else 'llama-3-8b'}, or a folder that holds its config.json"
        raise ConfigError(Problem(code="model.no-config", message=message, where="model.name", hint=hint))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        config = AutoConfig.for_model(**values)
        remove_lost_ids(config)
        return config
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ConfigError(_unplannable(path, f"it is not the config of a model that transformers knows: {first_line(error)}")) from error


def require_layers(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """Return `config`. Raises ConfigError if it lacks the number and the sizes of layers, from which a plan is made."""
    text = config.get_text_config()
    sizes = {key: getattr(text, key, None) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    absent = [key for key, value in sizes.items() if value is None]
    if absent:
        raise ConfigError(_unplannable(Path(name), f"a plan needs {', '.join(absent)}, which the config does not have"))
    wrong = [f"{key} {value}" for key, value in sizes.items() if not isinstance(value, int) or value < 1]
    if wrong:
        raise ConfigError(_unplannable(Path(name), f"its config gives no usable {', '.join(wrong)}"))
    return config


def _unplannable(path: Path, message: str) -> Problem:
    return Problem(code="model.unplannable", message=message, where=str(path), hint="--model llama-3-8b, or another config.json")


def skeleton(config: PreTrainedConfig, *, layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """A model with this config but `layers` layers, on the meta device.

    Raises ConfigError if class or config show that documents of the model run one at a time, because that time cannot be estimated.
    """
    register_attention()
    if (reason := no_packing_reason(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)) is not None:
        raise ConfigError(_not_packed(reason))
    values = config.to_dict() | {"num_hidden_layers": layers}
    layer_types = values.get("layer_types")
    if layer_types:
        values["layer_types"] = [layer_types[number % len(layer_types)] for number in range(layers)]
    shallow = type(config).from_dict(values)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(shallow, dtype=dtype, attn_implementation=ATTENTION_NAME)
    return model


def require_packed(config: PreTrainedConfig, *, say: Callable[[str], None]) -> None:
    """Raise ConfigError if documents of the model run one at a time; calls `say` if this cannot be known without weights."""
    layers = min(2, config.get_text_config().num_hidden_layers)
    reason, conclusive = try_packing_without_weights(skeleton(config, layers=layers, dtype=torch.float32))
    if reason is not None:
        raise ConfigError(_not_packed(reason))
    if not conclusive:
        say("whether documents of this model run together is only known at the start of a run: the plan assumes that they do")


def _not_packed(reason: str) -> Problem:
    message = (
        f"documents of this model run one at a time, because {reason}; a plan cannot be made for it; one process, or replicas, can train it"
    )
    return Problem(code="model.unplannable", message=message, where="model.name")


def pretend(model: nn.Module) -> None:
    """Replace every weight and buffer by a tensor of its shape and dtype on the CPU, which takes no memory in a FakeTensorMode."""
    replaced: dict[int, nn.Parameter] = {}  # so that a weight shared by two modules stays shared
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if id(weight) not in replaced:
                    replaced[id(weight)] = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), requires_grad=weight.requires_grad)
                module._parameters[name] = replaced[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def count_weights(model: nn.Module, head: nn.Parameter) -> dict[str, int]:
    """The number of weights by use: frozen, trained, adapters, and products and trained_products, without embeddings and `head`."""
    parameters = list(model.named_parameters())
    matrices = [each for name, each in parameters if each.ndim == 2 and each is not head and "embed" not in name]
    shared = shared_products(model)
    return {
        "frozen": sum(each.numel() for _, each in parameters if not each.requires_grad),
        "trained": sum(each.numel() for _, each in parameters if each.requires_grad),
        "adapters": sum(each.numel() for name, each in parameters if ".lora_A." in name or ".lora_B." in name),
        "products": sum(each.numel() for each in matrices) + shared,
        "trained_products": sum(each.numel() for each in matrices if each.requires_grad) + shared,
    }
