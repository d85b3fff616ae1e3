"""Write the learned end tokens into the files of a saved model: generation_config.json, for transformers and vLLM, and the tokenizer's.

Call these functions after the auxiliary files of the base were copied. A file that already names the tokens is not changed.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamahome.model.limits import SPECIAL, ids_in, lost_ids

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_FROM_CONFIG = ("bos_token_id", "pad_token_id")
"""Keys that transformers reads from config.json if there is no generation_config.json."""


def name_ends(folder: Path, base: Path, learned: Sequence[int], *, rows: int | None = None) -> None:
    """Add the `learned` end ids to `eos_token_id` in the folder's generation_config.json, after the ids of the base.

    With `rows`, the size of the embedding, ids of special tokens without a row are removed, because padding with one would fail.
    """
    if rows is not None and lost_ids(folder, rows):
        _write(folder / _GENERATION, _without_lost(_read(folder / _GENERATION) or {}, rows))
    if not learned:
        return
    generation = _read(folder / _GENERATION)
    config = _read(folder / _CONFIG) or _read(base / _CONFIG) or {}
    config = config if rows is None else _without_lost(config, rows)
    eos = (config if generation is None else generation).get("eos_token_id")
    known = [number for number in (eos if isinstance(eos, list) else [eos]) if number is not None]
    if generation is not None and set(learned) <= set(known):
        return
    if generation is None:
        generation = {key: config[key] for key in _FROM_CONFIG if config.get(key) is not None}
    generation.pop("_from_model_config", None)  # with this key transformers may ignore the file and read config.json instead
    end_ids = list(dict.fromkeys([*known, *learned]))
    generation["eos_token_id"] = end_ids[0] if len(end_ids) == 1 else end_ids
    _write(folder / _GENERATION, generation)


def _without_lost(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """A copy of `config` without the ids of special tokens that have no row in an embedding of `rows`."""
    kept = dict(config)
    for name in SPECIAL:
        ids = ids_in(config.get(name))
        within = [number for number in ids if 0 <= number < rows]
        if not within and ids:
            del kept[name]
        elif len(within) < len(ids):
            kept[name] = within
    return kept


def name_eos(folder: Path, token: str) -> None:
    """Set the end token of the tokenizer saved in `folder`."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = _read(folder / name)
        if content is None and name == "tokenizer_config.json":
            content = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if content is not None:
            _write(folder / name, content | {"eos_token": token})


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
