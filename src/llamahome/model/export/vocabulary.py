"""A tokenizer as GGUF metadata: tokens, types, merges, the pre-tokenizer's name, special tokens, chat template.

llama.cpp splits text by a rule that it knows by name, so the name is found from what the tokenizer does. A tokenizer whose rule
has no name in llama.cpp is refused, because its model would read other tokens than it was trained with.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llamahome.errors import ConfigError, Problem

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's types of tokens."""
MOST_ENDS = 3
"""Tokens that end an answer in a GGUF file: end of sequence, of turn, of message."""
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BY_THREE = _CONTRACTIONS + r"\p{N}{1,3}" + _AFTER_DIGITS
_BY_ONE = _CONTRACTIONS + r"\p{N}" + _AFTER_DIGITS
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class TokenizerFacts:
    """What an export must know of a tokenizer."""

    content: Mapping[str, Any]
    """The tokenizer as it runs, in the form of tokenizer.json: the class of a family may split otherwise than its own file says."""
    bos: int | None
    pad: int | None
    adds_bos: bool
    """Whether a text begins with bos."""
    ends: tuple[int, ...]
    """Ids that end an answer, the main one first."""
    chat_template: str | None


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    model: str
    """gpt2 (bytes and merges) or llama (pieces with scores)."""
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    add_space_prefix: bool


def read_vocabulary(tokenizer: Mapping[str, Any], rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer.json, filled up to the `rows` of the embedding. Raises ConfigError export.unsupported-tokenizer."""
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise _refused(f"its tokenizer is of the kind {model['type']}")
    added = {entry["id"]: entry for entry in tokenizer.get("added_tokens", [])}
    texts = {number: text for text, number in model["vocab"].items()} | {number: entry["content"] for number, entry in added.items()}
    if max(texts) >= rows:
        raise _refused(f"its tokenizer has the id {max(texts)}, and its embedding {rows} rows")
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(rows)]
    types = [_type(number, texts, added, model) for number in range(rows)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if any(step["type"] == "ByteLevel" for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")):
        return Vocabulary("gpt2", pre_tokenizer(tokenizer), tokens, types, [], merges, add_space_prefix=False)
    if model.get("byte_fallback"):
        _require_pieces(tokenizer)
        scores = [-float(number) for number in range(rows)]  # merges of such vocabularies are in the order of ids
        return Vocabulary("llama", "default", tokens, types, scores, [], add_space_prefix=_adds_space(tokenizer))
    raise _refused("its tokenizer works neither on bytes nor on pieces with byte fallback")


def _type(number: int, texts: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], model: Mapping[str, Any]) -> int:
    if number not in texts:
        return UNUSED
    text = texts[number]
    if text == model.get("unk_token"):
        return UNKNOWN
    if number in added:
        return CONTROL if added[number].get("special") else USER_DEFINED
    if model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return BYTE
    return NORMAL


def _steps(part: Any, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, in order."""
    if not part:
        return []
    return [step for inner in part[key] for step in _steps(inner, key)] if part["type"] == "Sequence" else [part]


def pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of the rule by which a byte-level tokenizer splits text. Raises ConfigError when it has none."""
    normalizers = {step["type"] for step in _steps(tokenizer.get("normalizer"), "normalizers")}
    if normalizers - {"NFC"}:
        raise _refused(f"its tokenizer changes text before it splits it ({', '.join(sorted(normalizers))})")
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if any(step.get("add_prefix_space") for step in steps):
        raise _refused("its tokenizer puts a space before every text")
    rule = [_rule(step) for step in steps]
    rule = [each for each in rule if each]
    whole = bool(tokenizer["model"].get("ignore_merges"))
    named = {
        (_GPT2,): "gpt-2",
        ("digits", _GPT2): "smollm",
        (_BY_THREE,): "llama-bpe" if whole else "dbrx",
        (_BY_ONE,): "qwen2",
    }
    found = named.get(tuple(rule))
    if found is None or (whole and found != "llama-bpe"):
        raise _refused("llama.cpp has no name for the rule by which its tokenizer splits text")
    return found


def _rule(step: Mapping[str, Any]) -> str:
    """A step as the pattern that it splits by; empty for one that does not split."""
    if step["type"] == "ByteLevel":
        return _GPT2 if step.get("use_regex", True) else ""
    if step["type"] == "Digits":
        return "digits" if step.get("individual_digits") else "groups of digits"
    if step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex") or step["pattern"].get("String"))
    return str(step["type"])


def _require_pieces(tokenizer: Mapping[str, Any]) -> None:
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        spaces = step["type"] == "Replace" and step.get("content") == "\u2581" and step["pattern"] == {"String": " "}
        if not spaces and not (step["type"] == "Prepend" and step.get("prepend") == "\u2581"):
            raise _refused(f"its tokenizer changes text before it splits it ({step['type']})")
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        between_words = step["type"] == "Split" and step["pattern"] == {"String": " "}
        if step["type"] != "Metaspace" and not between_words:
            raise _refused(f"its tokenizer splits text by {step['type']}")
        if step["type"] == "Metaspace" and step.get("split", True):
            raise _refused("its tokenizer splits text at every space")


def _adds_space(tokenizer: Mapping[str, Any]) -> bool:
    normalizers = _steps(tokenizer.get("normalizer"), "normalizers")
    splits = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "Prepend" for step in normalizers) or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") in ("always", "first") for step in splits
    )


def _refused(why: str) -> ConfigError:
    message = f"no GGUF file can hold this tokenizer: {why}"
    return ConfigError(Problem(code="export.unsupported-tokenizer", message=message, where="--to", hint="--to merged"))


def add_vocabulary(writer: Any, vocabulary: Vocabulary, facts: TokenizerFacts) -> None:
    """Write a vocabulary, special tokens and the chat template into a GGUFWriter."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if facts.bos is not None:
        writer.add_bos_token_id(facts.bos)
    if facts.pad is not None:
        writer.add_pad_token_id(facts.pad)
    if UNKNOWN in vocabulary.types:
        writer.add_unk_token_id(vocabulary.types.index(UNKNOWN))
    for number, add in zip(facts.ends, (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(number)
    writer.add_add_bos_token(facts.adds_bos)
    writer.add_add_eos_token(False)
    if facts.chat_template is not None:
        writer.add_chat_template(facts.chat_template)
