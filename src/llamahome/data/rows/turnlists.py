"""Where a row has its list of turns, and under which keys a turn has its speaker and its text.

`messages` and `conversations` are taken at their word; lists under the other usual names only when they look like turns.
"""

import json
from collections.abc import Mapping
from typing import Any

from llamahome.data.rows.fault import Finding
from llamahome.data.rows.parts import Parts, find_parts, plain_name

TURN_LISTS = ("messages", "conversations")
"""Keys under which a list of turns is found, whichever way its turns are written."""
_OTHER_LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "data", "chosen")
_TEXT_LISTS = ("conversations", "conversation", "dialog", "dialogue", "data")
"""Names under which a list of texts is a chat, user and assistant in turn (UltraChat)."""
_PAIR_LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
_SPEAKER = ("role", "from", "speaker", "author", "sender")
_TEXT = ("content", "value", "text", "message", "utterance")


def turn_list(value: Mapping[str, Any], names: Mapping[str, str]) -> str | None:
    """The key under which the row has a list of turns."""
    for ours in TURN_LISTS if names else ():
        if ours in names:
            return names[ours]
    for key in TURN_LISTS:
        if key in value:
            return key
    likely = [key for key in value if isinstance(key, str) and key not in names.values() and plain_name(key) in _OTHER_LISTS]
    return next((key for key in likely if _looks_like_turns(key, value[key])), None)


def from_text(listed: object) -> object:
    """A list of turns that stands as JSON text, as tables have it; anything else as it is."""
    if isinstance(listed, str) and listed.lstrip().startswith("["):
        try:
            return json.loads(listed)
        except (ValueError, RecursionError):
            return None
    return listed


def are_texts(key: str, listed: object) -> bool:
    """Whether the list is a chat written as texts alone, the user's first."""
    return isinstance(listed, list) and len(listed) > 1 and plain_name(key) in _TEXT_LISTS and all(isinstance(text, str) for text in listed)


def spelled(listed: object, otherwise: tuple[str, str]) -> tuple[str, str]:
    """The keys under which the turns have speaker and text; `otherwise` where the first turn has them or has none that are known."""
    first = next((turn for turn in listed if isinstance(turn, dict)), {}) if isinstance(listed, list) else {}
    speaker, text = (next((key for key in known if key in first), None) for known in (_SPEAKER, _TEXT))
    if otherwise[0] in first or speaker is None:
        speaker = otherwise[0]
    if otherwise[1] in first or text is None:
        text = otherwise[1]
    return speaker, text


def are_pairs(key: str, listed: object) -> bool:
    """Whether the list is a chat written as pairs of a question and an answer; under `data` such pairs are rows of their own."""
    first = listed[0] if isinstance(listed, list) and listed else None
    if not isinstance(first, dict) or plain_name(key) not in _PAIR_LISTS or any(name in first for name in _SPEAKER):
        return False
    return isinstance(find_parts(first, taken={}), Parts)


def as_turns(listed: list[Any], *, path: str) -> list[dict[str, Any]]:
    """Texts, or pairs of a question and an answer, as turns of user and assistant; raises Finding for a pair that is none."""
    if not are_pairs(path, listed):
        return [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(listed)]
    turns = []
    for number, pair in enumerate(listed):
        parts = find_parts(pair, taken={}) if isinstance(pair, dict) else None
        if not isinstance(parts, Parts):
            raise Finding("data.unclear-columns", f"{path}[{number}] is no pair of a question and an answer as {path}[0] is", part=pair)
        turns += [{"role": "user", "content": pair[parts.prompt]}, {"role": "assistant", "content": pair[parts.completion]}]
    return turns


def _looks_like_turns(key: str, listed: object) -> bool:
    listed = from_text(listed)
    if not isinstance(listed, list) or not listed:
        return False
    if are_texts(key, listed) or are_pairs(key, listed):
        return True
    first = listed[0]
    if not isinstance(first, dict) or not any(name in first for name in _SPEAKER):
        return False
    answer = plain_name(key) == "chosen" and next((first[name] for name in _SPEAKER if name in first), None) == "assistant"
    return not answer  # a `chosen` that begins with the assistant is the answer to a prompt beside it
