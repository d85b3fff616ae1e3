"""From a name to a model in memory: a folder, a name under data/models/base/, the starter, or a hub id.

Nothing but safetensors is read and no code from a model's repository is run. Weights are memory-mapped and kept once, in one type.
"""

import difflib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from llamahome.errors import ConfigError, LlamaHomeError, MachineError, Problem
from llamahome.model.attention import register_attention
from llamahome.model.backends.loss import Head
from llamahome.model.decoder import decoder_of
from llamahome.model.kinds import missing_weights, why_no_decoder, why_unknown
from llamahome.model.limits import without_lost_padding
from llamahome.model.probe import Unfit, settle
from llamahome.model.starter import STARTER, fetch_starter
from llamahome.model.weightfiles import INDEX, refuse_broken, refuse_not_finite
from llamahome.rundir import BASE_MODELS, as_typed

CausalLM = PreTrainedModel
"""What the rest of llamahome calls a model: a causal language model of transformers."""
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What configs call the cap of the logits: Gemma 2 and others, RecurrentGemma, xLSTM."""
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.spm", "*.vocab", "*.tiktoken", "LICENSE*", "NOTICE*"]


def quiet_transformers() -> None:
    """No progress bars and no advice from transformers on the screen; its messages still reach our log."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.ERROR)


def find_model(name: str, *, revision: str | None = None, say: Callable[[str], None]) -> Path:
    """The local folder of a base model, fetched first when it is the starter or a hub id. Raises ConfigError or MachineError."""
    quiet_transformers()
    for folder in (Path(name).expanduser(), BASE_MODELS / name):
        if folder.is_dir():
            _check_folder(folder)
            return folder
    if name == STARTER:
        return fetch_starter(say=say)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_like_path:
        raise ConfigError(_unknown_model(name))
    return _from_hub(name, revision, say)


def _unknown_model(name: str) -> Problem:
    known = sorted({STARTER, *(path.name for path in BASE_MODELS.glob("*") if (path / "config.json").is_file())})
    near = difflib.get_close_matches(name, known, n=1)
    return Problem(
        code="model.not-found",
        message=f"there is no model {name!r}: neither a folder, nor a name under {BASE_MODELS}, nor a hub id like org/name",
        where="model.name",
        hint=f"--model {near[0] if near else STARTER}",
    )


def _check_folder(folder: Path) -> None:
    """ConfigError when a folder cannot be a base model, saying what it is instead."""
    if (folder / "adapter_config.json").is_file():
        problem = "it holds an adapter, not a base model"
        code, hint = "model.is-an-adapter", f"llamahome chat {folder}"
    elif not (folder / "config.json").is_file():
        code, problem, hint = (
            "model.no-config",
            "it has no config.json, so it is not a model folder",
            f"--model {_inside(folder) or STARTER}",
        )
    elif any(folder.glob("*.safetensors")) or (folder / INDEX).is_file():
        refuse_broken(folder)
        return
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        code, problem = "model.pickled-weights", "its weights are pickled; they could run code when they are opened, so they are not"
        hint = f"--model {STARTER}, or a copy of this model with .safetensors files"
    else:
        code, problem, hint = "model.no-weights", "it has a config.json but no .safetensors file", f"--model {_inside(folder) or STARTER}"
    raise ConfigError(Problem(code=code, message=problem, where=str(folder), hint=hint))


def _inside(folder: Path) -> str | None:
    """The first folder of this one that holds a model, as one types it: a download often puts the model one floor deeper."""
    held = (path.parent for pattern in ("*/config.json", "*/*/config.json") for path in sorted(folder.glob(pattern)))
    return next((as_typed(path) for path in held if any(path.glob("*.safetensors"))), None)


def _from_hub(name: str, revision: str | None, say: Callable[[str], None]) -> Path:
    from huggingface_hub import errors, snapshot_download

    settings: dict[str, Any] = {"repo_id": name, "revision": revision, "allow_patterns": _HUB_FILES}
    try:
        return Path(snapshot_download(**settings, local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError, ValueError):
        pass  # not in the cache, or not whole
    say(f"fetching {name} from the hub")
    reason, hint = "", f"--model {STARTER}, or a folder that holds this model"
    try:
        return Path(snapshot_download(**settings))
    except errors.GatedRepoError:
        reason, hint = "access to it must be granted first", "set HF_TOKEN to a token of an account that may read it"
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        reason = f"the hub does not have it{f' at revision {revision}' if revision else ''} ({type(error).__name__})"
    except errors.HFValidationError as error:
        raise ConfigError(_unknown_model(name)) from error
    except (OSError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "ON", "YES")
        reason = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else f"the hub cannot be reached ({type(error).__name__})"
        hint = hint + (", or unset HF_HUB_OFFLINE" if offline else "")
    raise MachineError(Problem(code="model.hub-failed", message=f"{name} cannot be fetched: {reason}", where="model.name", hint=hint))


def load_model(folder: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The causal language model in `folder` with all weights in `dtype` on `device`, set up for its documents (packing.py)."""
    register_attention()
    quiet_transformers()
    try:
        if (why := why_unknown(folder, CONFIG_MAPPING)) is not None:
            raise ConfigError(_unsupported(folder, why))
        config = AutoConfig.from_pretrained(folder)
        _refuse_unsupported(config, folder)
        if without_lost_padding(config):  # torch's embedding would refuse it
            logging.getLogger(__name__).warning("pad_token_id of %s has no row in the embedding: left out", folder / "config.json")
        settings: dict[str, Any] = {"config": config, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        if device.type != "cpu":  # tensor by tensor to where they stay, so that the whole model never lies in the machine's memory
            settings["device_map"] = {"": device}
        model, found = AutoModelForCausalLM.from_pretrained(folder, **settings)
    except LlamaHomeError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ConfigError(_unreadable(folder, f"transformers cannot load it: {first}")) from error
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(_unreadable(folder, missing_weights(config, missing)))
    model.to(device)
    refuse_not_finite(model, folder)
    try:
        settle(model, head_of(model))
    except Unfit as error:
        raise ConfigError(_unsupported(folder, str(error))) from error
    return model


def _refuse_unsupported(config: Any, folder: Path) -> None:
    if getattr(config, "quantization_config", None):
        raise ConfigError(_unsupported(folder, "its weights are quantized"))
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if (why := why_no_decoder(config, known=config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, masked=masked)) is not None:
        raise ConfigError(_unsupported(folder, why))


def _unreadable(folder: Path, why: str) -> Problem:
    return Problem(code="model.unreadable", message=why, where=str(folder), hint=f"--model {STARTER}")


def _unsupported(folder: Path, why: str) -> Problem:
    return Problem(code="model.unsupported", message=f"this model cannot be trained: {why}", where=str(folder), hint=f"--model {STARTER}")


def head_of(model: PreTrainedModel) -> Head:
    """The output head with the scale and cap that this architecture gives its logits."""
    config = model.config.get_text_config()
    head: Any = model.get_output_embeddings()
    layer = head.token_adapter.base_layer if hasattr(head, "token_adapter") else head  # PEFT's wrapper puts trained rows into `weight`
    if not isinstance(layer, nn.Linear):
        raise ConfigError(_unsupported(Path(model.name_or_path), f"its output head is a {type(layer).__name__}"))
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = next((value for name in _CAPS if (value := getattr(config, name, None))), None)
    return Head(head.weight, layer.bias, scale, cap)


def decoder_layers(model: PreTrainedModel) -> list[Any]:
    """The layers of the decoder: children of its longest list of modules."""
    lists = [module for module in decoder_of(model).modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda modules: sum(1 for _ in modules)))
