"""Why rows are believed to be in a format, in words: which column is which, what is not read, and what else they could be read as."""

from collections.abc import Mapping
from typing import Any

from llamahome.data.rows.advice import setting
from llamahome.data.rows.columns import columns_of
from llamahome.data.rows.formats import KEYS, Names, has_history, parts_of, text_column
from llamahome.data.rows.parts import COMPLETION, Parts, about_of, answer_of, plain_name, system_of
from llamahome.data.rows.turnlists import TURN_LISTS, are_pairs, are_texts, from_text, spelled, turn_list

_SHOWN_UNREAD = 6
_LABELS = ("label", "labels", "class", "category", "sentiment", "rating", "score", "intent")


def reason(value: Mapping[str, Any], name: str, names: Names) -> str:
    """What of the row speaks for the format, and which of its keys are not read. `value` has what templates made."""
    read = {column for theirs in names.values() for column in columns_of(theirs)} | {*names.values(), "system", "tools", "functions"}
    if name in ("messages", "sharegpt"):
        key = turn_list(value, names) or ""
        listed = from_text(value.get(key))
        speaker, text = spelled(listed, ("role", "content") if name == "messages" else ("from", "value"))
        told = f"a list `{key}` of objects with {speaker} and {text}"
        if are_texts(key, listed) or are_pairs(key, listed):
            told = f"a list `{key}` of {'pairs' if are_pairs(key, listed) else 'texts'}, read as user and assistant in turn"
        read.add(key)
    elif name == "prompt_completion" and isinstance(parts := parts_of(value, names), Parts):
        told, read = _told_parts(value, parts, names), read | {*parts.columns()}
    elif name == "text":
        key = text_column(value, names)
        told, read = f"`{key}`, and no other key that a format knows", read | {key}
    elif name == "prompt_completion":
        told = f"`{names.get('prompt', 'prompt')}` and `{names.get('completion', 'completion')}`"
    else:
        shown = {key: names.get(key, key) for key in KEYS[name]}
        told, read = "`{instruction}` and `{output}`".format(**shown), read | {*shown.values()}
        before = () if names else (system_of(value), *about_of(value))
        also_read = [key for key in before if key is not None and key not in shown.values()]
        if also_read:
            about = tuple(key for key in (*about_of(value), "input") if key in value and key not in ("instruction", "output"))
            told = _told_parts(value, Parts("instruction", "output", system_of(value), tuple(dict.fromkeys(about))), names)
            read |= {*also_read}
    if name == "prompt_completion" and not isinstance(value.get(names.get("prompt", "prompt")), list):
        earlier = names.get("history", "history")
        told += f", after the turns of `{earlier}`" if has_history(value, names) else ""
        read |= {earlier} if has_history(value, names) or value.get(earlier) in (None, "", []) else set()
    unread = [key for key in value if key not in read]
    more = f" and {len(unread) - _SHOWN_UNREAD} more" if len(unread) > _SHOWN_UNREAD else ""
    told = told.replace("\n", "\\n")  # of a template
    return told + (f"; not read: {', '.join(unread[:_SHOWN_UNREAD])}{more}" if unread else "")


def also(value: Mapping[str, Any], name: str, names: Names, by_keys: str | None) -> str:
    """What else the rows could have been read as, for nothing is chosen in silence; `by_keys` is the format without their turns."""
    if names:
        return ""
    if name == "text":
        found = parts_of(value)
        if isinstance(found, Parts) or found.found["prompt"]:
            return ""
        labels = [key for key in value if isinstance(key, str) and plain_name(key) in (*COMPLETION, *_LABELS)]
        if labels and isinstance(value[labels[0]], str | int | float):
            answer = labels[0] if isinstance(value[labels[0]], str) else f"{{{labels[0]}}}"
            return f" ({setting(prompt=text_column(value), completion=answer)} learns to answer with {labels[0]} instead)"
        return ""
    other = by_keys if name in ("messages", "sharegpt") else ("text" if "text" in value else None)
    return f" (--set data.format={other} would read its other keys instead)" if other else ""


def without_turns(value: Mapping[str, Any]) -> dict[str, Any]:
    """The row without its list of turns."""
    key = turn_list(value, {})
    return {name: part for name, part in value.items() if name not in (key, *TURN_LISTS)}


def _told_parts(value: Mapping[str, Any], parts: Parts, names: Names) -> str:
    """Which column is which, where the names alone do not say it."""
    if parts.columns() == ("prompt", "completion") or ({"prompt", "completion"} <= names.keys() and not parts.system):
        return f"`{parts.prompt}` and `{parts.completion}`"
    asked = " and ".join(f"`{key}`" for key in (parts.prompt, *parts.context))
    first = "" if answer_of(value, parts.completion) is value[parts.completion] else "the first of "
    before = f"`{parts.system}` (the system text), " if parts.system else ""
    return f"{before}{asked} (the prompt) and {first}`{parts.completion}` (learned)"
