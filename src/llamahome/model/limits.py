"""The limits of a model, from its config and the shapes of its tensors: positions, trained length, size of the vocabulary.

Shapes come from the safetensors headers, so no weights are loaded. Imports no torch. `data_limits.py` checks the settings and rows.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamahome.errors import ConfigError, Problem

_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
"""Config keys for the number of positions."""
_LEARNED = re.compile(r"(^|[._])(wpe|wp|embed_positions|position_embeddings?|positions_embed|pos_emb\w*|positional_embedding\w*)(\.|$)")
"""Matches the names of position tables, which have a row for each position."""
_OTHER_SENSES = re.compile(r"(^|[._])(vision|visual|vit|siglip|clip|image|img|audio|speech|video)")
"""Matches the names of modules for images or sound, whose positions are not positions in a text."""
_FIXED_TABLES = ("ctrl", "gptj", "codegen")
"""Model types that compute a position table of fixed size."""
_ALIBI = ("bloom", "mpt", "falcon")
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Config keys for the ids of special tokens."""
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings?|tok_embeddings|embed_in|embeddings?|tokens_embed)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
"""Match the names of the embedding and the output head, which have a row for each token."""
LARGEST_HEADER = 100_000_000
"""Bytes of a safetensors header, the limit of the format."""
_MOST_OFFSET = 8
"""OPT's table has two rows more than positions."""


@dataclass(frozen=True)
class ModelLimits:
    """The limits of one model; None if the model has no such limit or its config does not name it."""

    positions: int | None
    """Tokens that a row can have in a model with a position table."""
    trained_length: int | None
    """Tokens up to which rotary positions were trained, including scaling; longer rows can be computed."""
    vocabulary: int | None
    """Rows of the embedding: token ids are smaller."""
    table: "Table | None" = None
    """The embedding or head whose number of rows differs from config.json, or None."""


@dataclass(frozen=True)
class Table:
    """A tensor with a row for each token."""

    name: str
    rows: int
    alone: bool
    """Whether all such tables of the model have this number of rows."""


def limits_of(folder: Path) -> ModelLimits:
    """The limits of the model in `folder`. Raises ConfigError if its config cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text: Mapping[str, Any] = {**config, **(config.get("text_config") or {})}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(Problem(code="model.unreadable", message="config.json cannot be read", where=str(folder))) from error
    return limits_from(text, shapes_of(folder))


def limits_from(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> ModelLimits:
    """The limits of a model with this text config and these tensor shapes by name."""
    named = next((config[name] for name in _POSITIONS if _is_count(config.get(name))), None)
    of_text = {name: shape for name, shape in shapes.items() if not _OTHER_SENSES.search(name)}
    tables = [shape[0] for name, shape in of_text.items() if len(shape) == 2 and shape[0] > 1 and _LEARNED.search(name)]
    positions = None
    if tables:
        rows = min(tables)
        positions = named if named is not None and 0 <= rows - named <= _MOST_OFFSET else rows
    elif config.get("model_type") in _FIXED_TABLES:
        positions = named
    vocabulary = config.get("vocab_size")
    trained = None if positions is not None or config.get("model_type") in _ALIBI else _trained_length(config, named)
    if not isinstance(vocabulary, int) or not _is_count(vocabulary):
        return ModelLimits(positions, trained, None)
    table = None if config.get("quantization_config") else _other_rows(of_text, vocabulary)
    return ModelLimits(positions, trained, vocabulary, table)


def rows_of_adapter(folder: Path) -> tuple[list[int], list[int]]:
    """Rows of the embedding and head in an adapter's folder: of those saved completely, and of those that have an adapter."""
    saved: list[int] = []
    adapted: list[int] = []
    for name, shape in shapes_of(folder).items():
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        if len(shape) == 2 and (_EMBEDDING.search(name) or _HEAD.search(name)):
            saved.append(shape[0])
        elif part in ("lora_B", "vera_lambda_b") and _HEAD.search(f"{layer}.weight"):
            adapted.append(shape[0])
        elif part == "lora_embedding_A":
            adapted.append(shape[1])
    return saved, adapted


def _other_rows(shapes: Mapping[str, Sequence[int]], vocabulary: int) -> Table | None:
    """The embedding or head that does not have `vocabulary` rows. An embedding may have more rows than the head, as in some models."""
    flat = {name: shape[0] for name, shape in shapes.items() if len(shape) == 2 and not name.startswith("base_model.")}
    heads = {name: rows for name, rows in flat.items() if _HEAD.search(name)}
    embeddings = {name: rows for name, rows in flat.items() if _EMBEDDING.search(name)}
    wrong = [name for name, rows in heads.items() if rows != vocabulary]
    wrong += [name for name, rows in embeddings.items() if rows < vocabulary or (rows > vocabulary and not heads)]
    tables = {**heads, **embeddings}
    return Table(wrong[0], tables[wrong[0]], len(set(tables.values())) == 1) if wrong else None


def _trained_length(config: Mapping[str, Any], named: int | None) -> int | None:
    """The length that rotary positions were trained for: the scaling factor times the length before scaling, which yarn configs name."""
    if named is None:
        return None
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    parts = [part for part in (scaling, *scaling.values()) if isinstance(part, Mapping)] if isinstance(scaling, Mapping) else []
    longest = named
    for part in parts:
        kind, factor = part.get("rope_type") or part.get("type") or "default", part.get("factor")
        before = part.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or 0
        if kind != "default" and isinstance(factor, int | float):
            longest = max(longest, int((before or named) * factor))
    return longest


@dataclass(frozen=True)
class LostId:
    """The id of a special token for which the embedding has no row."""

    place: str
    """The file that names the id."""
    name: str
    """The key in that file."""
    number: int


def lost_ids(folder: Path, rows: int) -> list[LostId]:
    """The ids of special tokens in the files of a model that have no row in an embedding of `rows`; -1 means no token."""
    lost: list[LostId] = []
    for file in ("config.json", "generation_config.json"):
        try:
            content = json.loads((folder / file).read_text(encoding="utf-8"))
            config = {**content, **(content.get("text_config") or {})}
        except (OSError, ValueError, AttributeError, TypeError):
            continue
        lost += [LostId(file, name, number) for name in SPECIAL for number in ids_in(config.get(name)) if not -1 <= number < rows]
    return lost


def ids_in(value: object) -> list[int]:
    """The ids in a config value, which is one id or a list of ids."""
    values = value if isinstance(value, list) else [value]
    return [number for number in values if isinstance(number, int) and not isinstance(number, bool)]


def remove_lost_ids(config: Any) -> None:
    """Remove the ids of special tokens without a row in the embedding from `config`, in place.

    torch's embedding refuses a padding id beyond its rows and takes -1 for the last row. `data_limits.py` reports the removed ids.
    """
    text = config.get_text_config()
    rows = getattr(text, "vocab_size", None)
    if not isinstance(rows, int):
        return
    for name in SPECIAL:
        ids = ids_in(getattr(text, name, None))
        kept = [number for number in ids if 0 <= number < rows]
        if len(kept) < len(ids):
            setattr(text, name, kept if len(kept) > 1 else next(iter(kept), None))


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    tensors: dict[str, dict[str, Any]]
    """Name of a tensor -> its dtype, shape and data_offsets."""
    nbytes: int
    """Of the header with its length: offsets count from here."""


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Raises OSError, or ValueError when it has none.

    Source: github.com/huggingface/safetensors: 8 bytes of length, little-endian, then JSON.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(LARGEST_HEADER, path.stat().st_size):
            raise ValueError("the header is longer than the file")
        content = json.loads(file.read(length))
    if not isinstance(content, dict):
        raise ValueError("the header is no JSON object")
    return Header({name: entry for name, entry in content.items() if name != "__metadata__"}, 8 + length)


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the .safetensors files of `folder`, by name. Files that cannot be read are skipped."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            shapes |= {name: tuple(tensor["shape"]) for name, tensor in read_header(path).tensors.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return shapes


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
