"""What to do about rows that are in no format: a mapping that would train the right thing, or the setting with words to put in.

A setting that can be typed as it stands is shown only where the names leave no doubt about the answer; elsewhere COLUMN stands for what
only a person knows, and no row has a key of that name.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from llamahome.data.files.jsonrow import excerpt
from llamahome.data.files.kinds import ending, list_within, take_out
from llamahome.data.records import Row
from llamahome.data.rows.fault import nearest
from llamahome.data.rows.parts import CHOICES, COMPLETION, PROMPT, WEAK_PROMPT, Unclear, find_parts, first_answer, plain_name
from llamahome.errors import Problem

_HOLE = "COLUMN"
_FORMATS = "messages, sharegpt, alpaca, prompt_completion, text"
_CLOSE = 0.85
"""How much of a name two spellings must share to be one: `respone` and `response` (0.93), not `prompt_id` and `prompt` (0.80)."""


def setting(**columns: str) -> str:
    """The option that sets data.columns so, as a shell takes it."""
    inside = ", ".join(f"{ours}: {_yaml(theirs)}" for ours, theirs in columns.items())
    return f"--set {shlex.quote(f'data.columns={{{inside}}}')}"


def unknown(rows: Sequence[Row], by_keys: str | None, *, turns_within: bool) -> Problem:
    """The problem of rows in no format. `by_keys` is the format of what a list within the first holds, `turns_within` whether turns."""
    row = rows[0]
    found = find_parts(row.value, taken={})
    keys = ", ".join(f'"{key}"' for key in list(row.value)[:12]) or "none"
    code, message = "data.unknown-format", f"the rows are in none of the formats {_FORMATS}; the keys here are {keys}"
    hint = _mapping(rows, found) if isinstance(found, Unclear) else None
    if isinstance(found, Unclear) and found.why:
        code, message = "data.unclear-columns", f"{found.why}: the setting data.columns tells; the keys here are {keys}"
    within = list_within(row.value)
    if within is not None and by_keys:
        alone = len(rows) == 1 and ending(row.source) == ".json"
        hint = take_out(row.source, within) if alone else f'the rows ({by_keys}) stand in the list "{within}": write each of them in a line'
    elif within is not None and turns_within:
        hint = setting(messages=within)
    return Problem(
        code=code, message=message, where=row.where, excerpt=excerpt(json.dumps(row.value, ensure_ascii=False), row.line), hint=hint
    )


def _mapping(rows: Sequence[Row], found: Unclear) -> str | None:
    """The setting that reads these rows, whole where that is certain."""
    texts = _text_columns(rows)
    if any(plain_name(key) in CHOICES for key in rows[0].value) and found.found["prompt"]:
        return "write each question with its choices as one text, in a column of its own, and name it in data.columns"
    if not rows[0].value:
        return None
    ask, answers, about = (list(found.found[part]) for part in ("prompt", "completion", "context"))
    asked = ask or _misspelt(texts, (*PROMPT, *WEAK_PROMPT[0]))
    answers = answers or _misspelt([key for key in texts if key not in asked], COMPLETION)
    if not (asked or answers or about) and len(texts) == len(rows[0].value) == 1:
        return setting(text=texts[0]) if _is_one_text(rows, texts[0]) else None
    alone = len(about) == 1 and {*about, *answers} == {*texts} and len(texts) == 2
    about = [*asked, *about, *(["text"] if found.text_is_context else [])] if asked or alone else []
    if any(key not in texts for key in about) or any(not isinstance(first_answer(rows[0].value[key]), str) for key in answers):
        return None
    if any(re.search(r"[{}]", key) for key in about):
        return None
    prompt = _HOLE if not about else about[0] if len(about) == 1 else "\n\n".join(f"{{{key}}}" for key in about)
    completion = answers[0] if len(answers) == 1 else _HOLE
    system = found.found["system"]
    shown = setting(**({"system": system[0]} if len(system) == 1 else {}), prompt=prompt, completion=completion)
    if _HOLE not in (prompt, completion):
        return shown
    choice = f"{' or '.join(answers)} for {_HOLE}" if len(answers) > 1 else f"the key to learn for {_HOLE}"
    if prompt == _HOLE:
        choice = f"the key to read for {_HOLE}" if completion != _HOLE else f"the keys to read and to learn for {_HOLE}"
    return f'{shown}   with {choice}; "{{a}} {{b}}" joins two keys'


def _is_one_text(rows: Sequence[Row], key: str) -> bool:
    """Whether the only column is plain text: not lists as text, nor a table whose columns some other sign separates."""
    if any(str(row.value[key] or "").lstrip()[:1] in ("[", "{") for row in rows):
        return False
    words = {word.lower() for word in key.split()}
    between = {*re.findall(r"[^\w .-]+", key), *([" "] if words & {*PROMPT} and words & {*COMPLETION} else [])}
    return not any(all(sign in str(row.value[key] or "") for row in rows) for sign in between)


def _text_columns(rows: Sequence[Row]) -> list[str]:
    """The keys that hold a text, or nothing, in every row."""
    cells = {key: [row.value.get(key) for row in rows] for key in rows[0].value}
    return [key for key, texts in cells.items() if any(texts) and all(text is None or isinstance(text, str) for text in texts)]


def _misspelt(columns: Sequence[str], known: Sequence[str]) -> list[str]:
    """The one column whose name is nearly a known one; none where there are several."""
    near = [key for key in columns if nearest(plain_name(key), known, cutoff=_CLOSE)]
    return near if len(near) == 1 else []


def _yaml(text: str) -> str:
    """The text as a value inside a YAML mapping in one line."""
    plain = re.fullmatch(r"[A-Za-z][\w-]*(?: [\w-]+)*", text) and text.lower() not in ("true", "false", "null", "yes", "no", "on", "off")
    return text if plain else json.dumps(text, ensure_ascii=False)


def good_answers(value: Mapping[str, Any], chosen: str) -> str | None:
    """The setting that learns the better answers of preference pairs alone; None where their prompt is not known."""
    answer = value[chosen]
    if isinstance(answer, list):
        first = answer[0].get("role", answer[0].get("from")) if answer and isinstance(answer[0], dict) else None
        if first != "assistant" or not isinstance(value.get("prompt"), list):
            return setting(messages=chosen) if first in ("user", "human", "system") else None
    found = find_parts({key: part for key, part in value.items() if plain_name(key) not in COMPLETION}, taken={"completion": chosen})
    if isinstance(found, Unclear):
        return None
    prompt = found.prompt if not found.context else "\n\n".join(f"{{{key}}}" for key in (found.prompt, *found.context))
    return setting(prompt=prompt, completion=chosen)
