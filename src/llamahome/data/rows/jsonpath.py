"""Paths inside a row: the value at `messages[2].content`, and a copy of the row with another value there.

Steps are keys (str) and numbers (int). A row is never changed: a copy is made of the objects on the path, and the rest is shared.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

Steps = tuple[str | int, ...]

_PATH = re.compile(r"`?([^\W\d]\w*(?:\.[^\W\d]\w*|\[\d+\])*)`? (?:is|has|contains) ")
_STEP = re.compile(r"\[(\d+)\]|(\w+)")


def show_path(steps: Steps) -> str:
    """("messages", 2, "content") -> "messages[2].content"."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def path_in(message: str, value: dict[str, Any]) -> Steps | None:
    """The path at the beginning of a message about the row; None if there is none, or no such value in the row."""
    match = _PATH.match(message)
    if match is None:
        return None
    steps = tuple(int(number) if number else key for number, key in _STEP.findall(match[1]))
    return steps if leads(value, steps) else None


def leads(value: Any, steps: Steps) -> bool:
    """Whether the row has a value at the path."""
    for step in steps:
        if isinstance(step, int):
            if not isinstance(value, list) or not step < len(value):
                return False
        elif not isinstance(value, dict) or step not in value:
            return False
        value = value[step]
    return True


def value_at(value: Any, steps: Steps) -> Any:
    """The value at a path that exists."""
    for step in steps:
        value = value[step]
    return value


def put(value: Any, steps: Steps, new: Any) -> Any:
    """A copy of `value` with `new` at the path."""
    if not steps:
        return new
    step, rest = steps[0], steps[1:]
    if isinstance(step, int):
        return [*value[:step], put(value[step], rest, new), *value[step + 1 :]]
    return {**value, step: put(value[step], rest, new)}


def rename(value: Any, steps: Steps, new: str) -> Any:
    """A copy of `value` in which the last key of the path is renamed to `new`; the order of the keys stays."""
    holder = value_at(value, steps[:-1])
    return put(value, steps[:-1], {new if key == steps[-1] else key: part for key, part in holder.items()})


def strings(value: Any, steps: Steps = ()) -> Iterator[tuple[Steps, str]]:
    """Every string of the row, with its path."""
    if isinstance(value, str):
        yield steps, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from strings(part, (*steps, key))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from strings(part, (*steps, number))


def change_strings(value: dict[str, Any], change: Callable[[str], str]) -> tuple[dict[str, Any], list[tuple[Steps, str, str]]]:
    """A copy of the row with `change` applied to each of its strings, and what changed: path, before, after."""
    changes = [(steps, text, new) for steps, text in strings(value) if (new := change(text)) != text]
    for steps, _, new in changes:
        value = put(value, steps, new)
    return value, changes
