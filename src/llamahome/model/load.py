"""Find and load a base model: a folder, a name under data/models/base/, the starter model, or a hub id.

Only safetensors are read, and no code from a model's repository is run. Weights are memory-mapped and kept once, in one dtype; those that
bitsandbytes has quantised stay packed.
"""

import difflib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from llamahome.errors import ConfigError, LlamaHomeError, MachineError, Problem
from llamahome.hub_cache import snapshot_in
from llamahome.model.attention import register_attention
from llamahome.model.backends.loss import Head
from llamahome.model.few_layers import few_layers
from llamahome.model.limits import remove_lost_ids, shapes_of
from llamahome.model.load_packed import ReadPacked, fill_gaps, hold_in_8_bits, make_gaps, packed_layers, quantized_twice
from llamahome.model.model_folder import check_folder, no_folder
from llamahome.model.packing import decoder_of
from llamahome.model.probe import UnsupportedModel, choose_packing
from llamahome.model.shard_load import Mesh, class_of_rows, cut_rows
from llamahome.model.starter import fetch_starter
from llamahome.model.stored_weights import keep_unused, refuse_unexplained
from llamahome.model.stream import stream_layers
from llamahome.model.unsupported import first_line, missing_weights, other_shapes, why_no_decoder, why_unknown
from llamahome.model.weightfiles import check_finite
from llamahome.progress_marks import NO_LIMIT, marks
from llamahome.rundir import BASE_MODELS, RUNS, STARTER

CausalLM = PreTrainedModel
"""A causal language model of transformers."""
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Config keys for the cap of the logits: Gemma 2 and others, RecurrentGemma, xLSTM."""
_REFUSALS = (
    *(OSError, ValueError, KeyError, IndexError, RuntimeError, ImportError, StrictDataclassError),
    *(AttributeError, TypeError, AssertionError, ZeroDivisionError),
)
"""What transformers raises for a config that it cannot make a model of; the second line: for values that it does not check."""
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.spm", "*.vocab", "*.tiktoken", "LICENSE*", "NOTICE*"]


def quiet_transformers() -> None:
    """Switch off the progress bars and warnings of transformers."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.set_tqdm_hook(_marking)


def _marking(make: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """A progress bar of transformers; each of its items, such as a loaded tensor, is a mark of progress."""
    items, *others = arguments or (None,)
    return make(*arguments, **options) if items is None else make(_marked(items), *others, **options)


def _marked(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        yield item
        marks.advance()


def find_model(name: str, *, revision: str | None = None, say: Callable[[str], None]) -> Path:
    """The local folder of a base model; the starter and hub ids are downloaded first. Raises ConfigError or MachineError."""
    quiet_transformers()
    for folder in (Path(name).expanduser(), BASE_MODELS / name):
        if folder.is_dir():
            if (snapshot := snapshot_in(folder)) is not None:
                say(f"{folder} is the hub's cache of a model, of which {snapshot.name[:12]} is taken")
                folder = snapshot
            check_folder(folder)
            return folder
    if Path(name).expanduser().is_file():
        raise ConfigError(no_folder(Path(name).expanduser()))
    if name == STARTER:
        return fetch_starter(say=say)
    own = Path(name).parts[:1] in (RUNS.parts[:1], BASE_MODELS.parts[:1]) and Path(name).parent.is_dir()
    if own or name.startswith((".", "/", "~")) or name.count("/") != 1:  # a path, no hub id
        raise ConfigError(_unknown_model(name))
    return _from_hub(name, revision, say)


def _unknown_model(name: str) -> Problem:
    known = sorted({STARTER, *(path.name for path in BASE_MODELS.glob("*") if (path / "config.json").is_file())})
    near = difflib.get_close_matches(name, known, n=1)
    return Problem(
        code="model.not-found",
        message=f"there is no model {name!r}: it is not a folder, not a name under {BASE_MODELS}, and not a hub id like org/name",
        where="model.name",
        hint=f"--model {near[0] if near else STARTER}",
    )


def _from_hub(name: str, revision: str | None, say: Callable[[str], None]) -> Path:
    from huggingface_hub import errors, snapshot_download

    settings: dict[str, Any] = {"repo_id": name, "revision": revision, "allow_patterns": _HUB_FILES}
    try:
        return Path(snapshot_download(**settings, local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError, ValueError):
        pass  # not in the cache, or only in part
    say(f"fetching {name} from the hub")
    reason, hint = "", f"--model {STARTER}, or a folder that holds this model"
    try:
        with marks.allowing(NO_LIMIT):
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


def load_model(
    folder: Path, *, dtype: torch.dtype, device: torch.device, keep_bytes: int | None = None, mesh: Mesh | None = None
) -> PreTrainedModel:
    """Load the causal language model in `folder`, with all weights in `dtype` on `device` and its packing decided (packing.py).

    Weights that bitsandbytes has quantised stay packed (packed_weight.py). With `keep_bytes` only so much of the layers is kept in memory,
    and the rest is read as it is used, if it can be (stream.py). With `mesh` only this process's rows are loaded (shard_load.py), and all
    its processes call this function. Raises ConfigError if the model cannot be loaded or trained.
    """
    register_attention()
    quiet_transformers()
    try:
        config, packed = _read_config(folder)
        options: dict[str, Any] = {"config": config, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        if device.type != "cpu":  # loads tensor by tensor, so that the CPU's memory never holds the whole model
            options["device_map"] = {"": device}
        by_rows = mesh if not packed else None
        loader = _class_with_gaps(config, list(packed)) if packed else AutoModelForCausalLM
        if by_rows is not None:
            _refuse_other_shapes(config, folder)  # here, because only some processes may have rows of another shape
            options["config"], of_config = _text_model(config)
            loader = class_of_rows(of_config, by_rows, shapes_of(folder))
        model, info = loader.from_pretrained(folder, **options)
    except LlamaHomeError:
        raise
    except (*_REFUSALS, SafetensorError) as error:
        mismatch = other_shapes(_expected_shapes(config), shapes_of(folder)) if "ignore_mismatched_sizes" in str(error) else None
        raise ConfigError(_unreadable(folder, mismatch or f"transformers cannot load it: {first_line(error)}")) from error
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(_unreadable(folder, missing_weights(config, missing)))
    if not packed:  # what bitsandbytes stores beside its codes is read elsewhere
        keep_unused(model, info["unexpected_keys"])
    if packed or by_rows is not None:
        model.__class__ = type(model).__mro__[1]
    if by_rows is not None:
        cut_rows(model, by_rows)
    else:
        model.to(device)
    if packed:
        fill_gaps(model, packed, dtype=dtype, device=device)
        if keep_bytes is None:
            hold_in_8_bits(decoder_layers(model))
    if keep_bytes is not None:
        stream_layers(model, decoder_layers(model), keep_bytes=keep_bytes)
    check_finite(model, folder)
    try:
        with few_layers(model):
            choose_packing(model, head_of(model))
    except UnsupportedModel as error:
        raise ConfigError(_unsupported(folder, str(error))) from error
    return model


def _read_config(folder: Path) -> tuple[Any, dict[str, ReadPacked]]:
    """The config of a model that can be trained, and its quantised weights by layer. Raises ConfigError, or what transformers raises."""
    if (reason := why_unknown(folder, CONFIG_MAPPING)) is not None:
        raise ConfigError(_unsupported(folder, reason))
    config = AutoConfig.from_pretrained(folder)
    packed = packed_layers(folder) if getattr(config, "quantization_config", None) else {}
    if packed:
        del config.quantization_config
    else:
        refuse_unexplained(folder)
    _refuse_unsupported(config, folder)
    remove_lost_ids(config)
    return config, packed


def _text_model(config: Any) -> tuple[Any, Any]:
    """The config and class that AutoModelForCausalLM takes: those of the text model where the type has a text model of its own."""
    of_config: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    text_config = config.sub_configs.get("text_config")
    return (config.get_text_config() if text_config is not None and of_config.config_class == text_config else config), of_config


def _refuse_other_shapes(config: Any, folder: Path) -> None:
    if (mismatch := other_shapes(_expected_shapes(config), shapes_of(folder))) is not None:
        raise ConfigError(_unreadable(folder, mismatch))


def _class_with_gaps(config: Any, names: Sequence[str]) -> Any:
    """A subclass of the model's class that is made with gaps in the place of the layers `names`, so that these are never in memory."""
    of_config: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    def make(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        of_config.__init__(self, *args, **kwargs)
        make_gaps(self, names)

    return type(of_config.__name__, (of_config,), {"__init__": make, "__module__": of_config.__module__})


def without_weights(folder: Path) -> PreTrainedModel:
    """The model in `folder` on the meta device, to be quantised. Raises ConfigError if it is quantised already or cannot be loaded."""
    quiet_transformers()
    try:
        config, packed = _read_config(folder)
        if packed:
            raise ConfigError(quantized_twice(folder))
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
            return model
    except _REFUSALS as error:
        raise ConfigError(_unreadable(folder, f"transformers cannot load it: {first_line(error)}")) from error


def tokens_of_text(folder: Path, text: str) -> tuple[list[int], int | None]:
    """The token ids of a plain text, none if transformers opens no tokenizer in `folder`, and the token that begins a text, if any."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError):
        return [], None


def _expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each weight that a model with this config has."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def _refuse_unsupported(config: Any, folder: Path) -> None:
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if (reason := why_no_decoder(config, known=config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, masked=masked)) is not None:
        raise ConfigError(_unsupported(folder, reason))


def _unreadable(folder: Path, reason: str) -> Problem:
    return Problem(code="model.unreadable", message=reason, where=str(folder), hint=f"--model {STARTER}")


def _unsupported(folder: Path, reason: str) -> Problem:
    message = f"this model cannot be trained: {reason}"
    return Problem(code="model.unsupported", message=message, where=str(folder), hint=f"--model {STARTER}")


def head_of(model: PreTrainedModel) -> Head:
    """The output head, with the scale and cap of the logits in this architecture."""
    config = model.config.get_text_config()
    head: Any = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # PEFT's wrapper of a head that is trained whole
        head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
    layer = head.token_adapter.base_layer if hasattr(head, "token_adapter") else head  # PEFT's wrapper merges trained rows into `weight`
    if not isinstance(layer, nn.Linear):
        raise ConfigError(_unsupported(Path(model.name_or_path), f"its output head is a {type(layer).__name__}"))
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = next((value for name in _CAPS if (value := getattr(config, name, None))), None)
    return Head(head.weight, layer.bias, scale, cap)


def decoder_layers(model: PreTrainedModel) -> list[Any]:
    """The layers of the decoder: the items of its longest ModuleList."""
    lists = [module for module in decoder_of(model).modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda modules: sum(1 for _ in modules)))
