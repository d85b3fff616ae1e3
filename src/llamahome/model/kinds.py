"""Which folders hold no text decoder, told in words of what they are: encoders, models that read images or sound, classifiers."""

import json
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

_SENSES = {"images": r"vision|visual|image|img|video", "sound": r"audio|speech"}


def why_unknown(folder: Path, known: Container[str]) -> str | None:
    """Why transformers has no class for what config.json describes; None when it has one."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind is None:
        return "its config.json names no model_type, so it is not in the form of transformers"
    if kind in known:
        return None
    if "auto_map" in values:
        return f"transformers has no code for its type {kind!r}, and code from a model folder is never run"
    return f"this version of transformers does not know its type {kind!r}"


def why_no_decoder(config: Any, *, known: bool, masked: bool) -> str | None:
    """Why a model is none that continues text; None when it is one.

    `known` and `masked`: whether transformers has a class of this type that continues text, and one that fills in masked words.
    """
    written = ", ".join(getattr(config, "architectures", None) or [])
    name = written or config.model_type
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, not a decoder"
    continues = re.search(r"ForCausalLM|LMHeadModel", written)
    if masked and not continues and not getattr(config, "is_decoder", False):
        return f"it is an encoder ({name}); only decoders, which continue a text, are trained"
    if known:
        return None
    senses = _senses(config)
    if senses:
        return f"it reads {' and '.join(senses)} too ({name}); only text models are trained"
    return f"{name} does not continue a text; only decoders are trained"


def _senses(config: Any) -> list[str]:
    """What a model reads beside text, by the sections and names in its config."""
    keys = " ".join(
        key for key, value in config.to_dict().items() if isinstance(value, dict) or key.endswith(("_token_id", "_token_index"))
    )
    return [sense for sense, pattern in _SENSES.items() if re.search(pattern, f"{keys} {config.model_type}")]


def missing_weights(config: Any, missing: Sequence[str]) -> str:
    """What it means that these weights are in no file."""
    written = ", ".join(getattr(config, "architectures", None) or [])
    told = f"{len(missing)} of its weights {'is' if len(missing) == 1 else 'are'} in no file, {missing[0]} for one"
    if written and not re.search(r"ForCausalLM|LMHead|ConditionalGeneration", written):
        return f"it is a {written}, which does not continue a text: {told}"
    return told
