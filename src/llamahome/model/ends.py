"""Where a saved model says at which tokens it ends: generation_config.json, which transformers and vLLM obey, and the tokenizer's files.

Written after the companions of the base were copied; files that say it already stay as they are, byte for byte.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_FROM_CONFIG = ("bos_token_id", "pad_token_id")
"""What transformers takes from config.json where there is no generation_config.json."""


def name_ends(folder: Path, base: Path, learned: Sequence[int]) -> None:
    """Add the ids that were learned as ends to `eos_token_id` of the folder's generation_config.json; the base's own stay, in front."""
    if not learned:
        return
    own = _read(folder / _GENERATION)
    config = _read(folder / _CONFIG) or _read(base / _CONFIG) or {}
    said = (config if own is None else own).get("eos_token_id")
    known = [number for number in (said if isinstance(said, list) else [said]) if number is not None]
    if own is not None and set(learned) <= set(known):
        return
    if own is None:
        own = {key: config[key] for key in _FROM_CONFIG if config.get(key) is not None}
    own.pop("_from_model_config", None)  # or transformers may read config.json again in its place
    ends = list(dict.fromkeys([*known, *learned]))
    own["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    _write(folder / _GENERATION, own)


def name_eos(folder: Path, token: str) -> None:
    """Make `token` the end token of the tokenizer that was saved into the folder."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = _read(folder / name)
        if content is None and name == "tokenizer_config.json":
            content = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if content is not None:
            _write(folder / name, content | {"eos_token": token})


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file; None when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
