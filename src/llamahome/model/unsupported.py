"""Explain why a model folder cannot be loaded or trained: encoders, models that read images or sound, classifiers, wrong shapes."""

import json
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

_MODALITIES = {"images": r"vision|visual|image|img|video", "sound": r"audio|speech"}


def why_unknown(folder: Path, known: Container[str]) -> str | None:
    """Why transformers has no class for the model type in config.json; None if it has one."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type is None:
        return "its config.json names no model_type, so it is not in the form of transformers"
    if model_type in known:
        return None
    if "auto_map" in config:
        return f"transformers has no code for its type {model_type!r}, and code from a model folder is never run"
    return f"this version of transformers does not know its type {model_type!r}"


def why_no_decoder(config: Any, *, known: bool, masked: bool) -> str | None:
    """Why a model is not a decoder of text; None if it is one.

    `known`: transformers has a causal language model of this type. `masked`: transformers has a masked language model of this type.
    """
    architectures = ", ".join(getattr(config, "architectures", None) or [])
    name = architectures or config.model_type
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, not a decoder"
    causal = re.search(r"ForCausalLM|LMHeadModel", architectures)
    if masked and not causal and not getattr(config, "is_decoder", False):
        return f"it is an encoder ({name}); only decoders, which continue a text, are trained"
    if known:
        return None
    if modalities := _modalities(config):
        return f"it reads {' and '.join(modalities)} too ({name}); only text models are trained"
    return f"{name} does not continue a text; only decoders are trained"


def _modalities(config: Any) -> list[str]:
    """What a model reads besides text, from the sections and token names in its config."""
    keys = " ".join(
        key for key, value in config.to_dict().items() if isinstance(value, dict) or key.endswith(("_token_id", "_token_index"))
    )
    return [modality for modality, pattern in _MODALITIES.items() if re.search(pattern, f"{keys} {config.model_type}")]


def missing_weights(config: Any, missing: Sequence[str]) -> str:
    """Describe the weights that are in no file."""
    architectures = ", ".join(getattr(config, "architectures", None) or [])
    message = f"{len(missing)} of its weights {'is' if len(missing) == 1 else 'are'} in no file, for example {missing[0]}"
    if architectures and not re.search(r"ForCausalLM|LMHead|ConditionalGeneration", architectures):
        return f"it is a {architectures}, which does not continue a text: {message}"
    if not getattr(config, "tie_word_embeddings", False) and all(re.search(r"(^|\.)(lm_head|embed_out)\.", name) for name in missing):
        return f'{message}; if the output head is the embedding, config.json says so with "tie_word_embeddings": true'
    return message


def other_shapes(expected: Mapping[str, Sequence[int]], actual: Mapping[str, Sequence[int]]) -> str | None:
    """Describe the weights whose shape differs from the one that config.json implies; None if there are none."""
    other = [name for name, shape in expected.items() if tuple(actual.get(name, shape)) != tuple(shape)]
    if not other:
        return None
    by_config, in_files = ((" x ".join(f"{size:,}" for size in shapes[other[0]])) for shapes in (expected, actual))
    message = f"{other[0]} is {in_files} in the weights' files, and {by_config} by config.json"
    return message if len(other) == 1 else f"{message}; {len(other)} weights do not agree with it"


def first_line(error: BaseException) -> str:
    """The first line of an error, cut at 300 characters; with the second line if the first ends in a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return line.partition(". Errors: ")[0][:300]
