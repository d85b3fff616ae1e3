"""Explains why rows are taken to be in a format and which keys are not read; suggests a setting for rows in no format.

A setting that can be typed as it is is shown only if the names leave no doubt about the answer. Otherwise COLUMN stands for what only a
person knows, and no row has a key of that name.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llamahome.data.files.commands import extract_list, list_within
from llamahome.data.files.jsonrow import excerpt
from llamahome.data.files.kinds import ending
from llamahome.data.files.split_files import role_of
from llamahome.data.records import Row
from llamahome.data.rows.column_roles import (
    COMPLETION,
    CONTEXT,
    PROMPT,
    WEAK_PROMPT,
    ColumnRoles,
    Unclear,
    answer_beside,
    answer_of,
    choice_columns,
    context_columns,
    find_roles,
    first_answer,
    plain_name,
    says_avoided,
    system_column,
)
from llamahome.data.rows.columns import columns_of, setting, text_paths
from llamahome.data.rows.formats import KEYS, Names, text_column
from llamahome.data.rows.row_error import nearest
from llamahome.data.rows.row_parts import has_history
from llamahome.data.rows.turns import TURN_LISTS, are_pairs, are_texts, opened, turn_keys, turn_list
from llamahome.errors import Problem

_PLACEHOLDER = "COLUMN"
_FORMATS = ", ".join(KEYS)
_SPELLING = 0.85
"""Similarity of two spellings of one name: `respone` and `response` (0.93), not `prompt_id` and `prompt` (0.80)."""
_REWARDS = "--set training.objective=grpo --reward FILE.py:FUNCTION"
_SHOWN_UNREAD = 6
_DESCRIBES = re.compile(r"(^|[._])(u?u?id|at|type|status|name|url|users?)(\.\d+)?$")
"""Matches the path of a text that says where a row is from: an id, a date, a type, a name."""
_SPLIT_COLUMNS = ("split", "splits", "data_split", "dataset_split", "set", "subset", "partition", "fold")
_LABELS = ("label", "labels", "code", "class", "category", "sentiment", "rating", "score", "intent")


def reason(value: Mapping[str, Any], name: str, names: Names) -> str:
    """Which keys of the row show the format, and which are not read. `value` includes the texts of templates."""
    columns = {column for theirs in names.values() for column in columns_of(theirs)}
    read = columns | {*names.values(), "system", "tools", "functions"}
    read |= {key for key in value if any(column.startswith(f"{key}.") for column in columns)}
    if name in ("messages", "sharegpt"):
        key = turn_list(value, names) or ""
        shown = _shown_turns(value, key, name)
        system = None if names else system_column(value)
        shown += f" and `{system}` (the system text)" if system not in (None, "system") and value.get(system or "") else ""
        read |= {key, system or "system"}
    elif name == "text":
        key = text_column(value, names)
        shown, read = f"`{key}`, and no other key that a format knows", read | {key}
    elif name == "alpaca":
        shown, shown_columns = _shown_alpaca(value, names)
        read |= shown_columns
    elif isinstance(roles := find_roles(value, names), ColumnRoles):
        shown, read = _shown_roles(value, roles, names), read | {*roles.columns()}
    else:
        shown = f"`{names.get('prompt', 'prompt')}` and `{names.get('completion', 'completion')}`"
    if name == "prompt_completion" and not isinstance(value.get(names.get("prompt", "prompt")), list):
        history = names.get("history", "history")
        shown += f", after the turns of `{history}`" if has_history(value, names) else ""
        read |= {history} if has_history(value, names) or value.get(history) in (None, "", []) else set()
    unread = [key for key in value if key not in read]
    more = f" and {len(unread) - _SHOWN_UNREAD} more" if len(unread) > _SHOWN_UNREAD else ""
    shown = shown.replace("\n", "\\n")  # a template may have line ends
    return shown + (f"; not read: {', '.join(unread[:_SHOWN_UNREAD])}{more}" if unread else "")


def _shown_turns(value: Mapping[str, Any], key: str, name: str) -> str:
    turns = opened(value.get(key))
    if are_pairs(key, turns):
        return f"a list `{key}` of pairs, read as user and assistant in turn"
    if are_texts(key, turns):
        return f"a list `{key}` of texts, read as user and assistant in turn"
    speaker, text = turn_keys(turns, ("role", "content") if name == "messages" else ("from", "value"))
    if isinstance(value.get(key), dict):
        return f"`{key}` with one list of {speaker} and one of {text}, read turn by turn"
    return f"a list `{key}` of objects with {speaker} and {text}"


def _shown_alpaca(value: Mapping[str, Any], names: Names) -> tuple[str, set[str]]:
    """The description of an alpaca row and the keys that are read."""
    columns = {key: names.get(key, key) for key in KEYS["alpaca"]}
    system, context = (None, ()) if names else (system_column(value), context_columns(value))
    others = {key for key in (system, *context) if key is not None} - {*columns.values()}
    if not others:
        return f"`{columns['instruction']}` and `{columns['output']}`", {*columns.values()}
    after = tuple(dict.fromkeys(key for key in (*context, "input") if key in value and key not in ("instruction", "output")))
    return _shown_roles(value, ColumnRoles("instruction", "output", system, after), names), {*columns.values(), *others}


def _shown_roles(value: Mapping[str, Any], roles: ColumnRoles, names: Names) -> str:
    """Which column has which role, unless the names alone say it."""
    if roles.columns() == ("prompt", "completion") or ({"prompt", "completion"} <= names.keys() and not roles.system):
        return f"`{roles.prompt}` and `{roles.completion}`"
    question = " and ".join(f"`{key}`" for key in (roles.prompt, *roles.context))
    first = "" if answer_of(value, roles.completion) is value[roles.completion] else "the first of "
    before = f"`{roles.system}` (the system text), " if roles.system else ""
    return f"{before}{question} (the prompt) and {first}`{roles.completion}` (learned)"


def alternative(value: Mapping[str, Any], name: str, names: Names, without_turns: str | None) -> str:
    """What else the rows could be read as, so that no choice is silent; `without_turns` is the format of their other keys."""
    if names:
        return ""
    if name == "text":
        roles = find_roles(value)
        labels = [key for key in value if isinstance(key, str) and plain_name(key) in (*COMPLETION, *_LABELS)]
        asks = isinstance(roles, ColumnRoles) or roles.candidates["prompt"]
        if asks or not labels or not isinstance(value[labels[0]], str | int | float):
            return ""
        answer = labels[0] if isinstance(value[labels[0]], str) else f"{{{labels[0]}}}"
        return f" ({setting(prompt=text_column(value), completion=answer)} learns to answer with {labels[0]} instead)"
    other = without_turns if name in ("messages", "sharegpt") else ("text" if "text" in value else None)
    return f" (--set data.format={other} would read its other keys instead)" if other else ""


def other_keys(value: Mapping[str, Any]) -> dict[str, Any]:
    """The row without its list of turns."""
    key = turn_list(value, {})
    return {name: part for name, part in value.items() if name not in (key, *TURN_LISTS)}


def split_column(value: Mapping[str, Any]) -> str:
    """A note if a column says which split the row belongs to, because rows of all splits are read then; "" for other rows."""
    key = next((key for key in value if isinstance(key, str) and plain_name(key) in _SPLIT_COLUMNS), None)
    written = "" if key is None else value[key]
    if not isinstance(written, str) or not written or role_of(written) is None:
        return ""
    return f"; `{key}` says {written}, and rows of every split are read: write those to train on into a file of their own"


def unknown(rows: Sequence[Row], inner_format: str | None, *, inner_is_turn: bool, nested: str | None) -> Problem:
    """The problem of rows in no format; `nested` is what makes rows of objects that hold them.

    The other parameters are about the objects in a list within the first row.
    """
    row = rows[0]
    roles = find_roles(row.value)
    keys = ", ".join(f'"{key}"' for key in list(row.value)[:12]) or "none"
    code, message = "data.unknown-format", f"the rows are in none of the formats {_FORMATS}; the keys here are {keys}"
    hint = _mapping(rows, roles) if isinstance(roles, Unclear) else None
    if isinstance(roles, Unclear) and roles.why:
        code, message = "data.unclear-columns", f"{roles.why}; set data.columns to choose; the keys here are {keys}"
    within = list_within(row.value)
    lie_within = _texts_within(row.value) if hint is None or _PLACEHOLDER in hint else ""
    if lie_within:
        both = setting(prompt=f"{{{_PLACEHOLDER}}}", completion=f"{{{_PLACEHOLDER}}}")
        hint = f"{hint or f'{both}   with what to read and to learn for {_PLACEHOLDER}'}; texts within others: {lie_within}"
    if nested is not None:
        hint = nested
    elif within is not None and inner_format:
        alone = len(rows) == 1 and ending(row.source) == ".json"
        beside = [key for key, cell in row.value.items() if isinstance(cell, str) and plain_name(key) in (*PROMPT, *CONTEXT)]
        with_them = f", with {' and '.join(beside)} in each" if beside else ""
        in_lines = f'the rows ({inner_format}) are in the list "{within}": write each of them on a line of its own{with_them}'
        hint = extract_list(row.source, within) if alone else in_lines
    elif within is not None and inner_is_turn:
        answer = answer_beside(row.value, within)
        answered = row.value[within][-1].get("role") in ("assistant", "model")
        rewarded = f"{_REWARDS}   learns from prompts without answers"
        hint = setting(messages=within) if answered else rewarded if answer is None else setting(**answer)
    shown = excerpt(json.dumps(row.value, ensure_ascii=False), row.line)
    return Problem(code=code, message=message, where=row.where, excerpt=shown, hint=hint)


def _mapping(rows: Sequence[Row], unclear: Unclear) -> str | None:
    """The setting that reads these rows, complete if it is certain."""
    value, texts = rows[0].value, _text_columns(rows)
    choices = choice_columns(value)
    if choices and unclear.candidates["prompt"]:
        return _with_choices(value, choices, unclear)
    if unclear.rated:
        return "write the answer that is to be learned as one text, in a column of its own, and name it in data.columns"
    if not value:
        return None
    prompts, answers, context = (list(unclear.candidates[role]) for role in ("prompt", "completion", "context"))
    prompts = prompts or _misspelt(texts, (*PROMPT, *WEAK_PROMPT[0]))
    answers = answers or _misspelt([key for key in texts if key not in prompts and not says_avoided(key)], COMPLETION)
    if not (prompts or answers or context) and len(texts) == len(value) == 1:
        return setting(text=texts[0]) if _is_one_text(rows, texts[0]) else None
    only_context = len(context) == 1 and {*context, *answers} == {*texts} and len(texts) == 2
    shown_columns = [*prompts, *context, *(["text"] if unclear.text_is_context else [])] if prompts or only_context else []
    not_texts = any(key not in texts for key in shown_columns) or any(not isinstance(first_answer(value[key]), str) for key in answers)
    if not_texts or any(re.search(r"[{}]", key) for key in shown_columns):
        return None
    prompt = "\n\n".join(f"{{{key}}}" for key in shown_columns) if len(shown_columns) > 1 else next(iter(shown_columns), _PLACEHOLDER)
    completion = answers[0] if len(answers) == 1 else _PLACEHOLDER
    system = unclear.candidates["system"]
    shown = setting(**({"system": system[0]} if len(system) == 1 else {}), prompt=prompt, completion=completion)
    if _PLACEHOLDER not in (prompt, completion):
        return shown
    choice = f"{' or '.join(answers)} for {_PLACEHOLDER}" if len(answers) > 1 else f"the key to learn for {_PLACEHOLDER}"
    if prompt == _PLACEHOLDER:
        both = completion == _PLACEHOLDER
        choice = f"the keys to read and to learn for {_PLACEHOLDER}" if both else f"the key to read for {_PLACEHOLDER}"
    return f'{shown}   with {choice}; "{{a}} {{b}}" joins two keys'


def _texts_within(value: Mapping[str, Any]) -> str:
    """Paths to the texts within columns, for a message; "" if there are none. Turns and what only describes the row are left out."""
    turns = [
        key
        for key, cell in value.items()
        if isinstance(cell, list) and cell and isinstance(cell[0], dict) and {"role", "from"} & cell[0].keys()
    ]
    paths = [path for path in text_paths({key: value[key] for key in value if key not in turns}) if not _DESCRIBES.search(path)]
    return ", ".join(paths[:_SHOWN_UNREAD]) + (f" and {len(paths) - _SHOWN_UNREAD} more" if len(paths) > _SHOWN_UNREAD else "")


def _with_choices(value: Mapping[str, Any], choices: Sequence[str], unclear: Unclear) -> str:
    """The setting that puts a question before its choices, if each has a column of its own and the roles are clear."""
    questions, answers = unclear.candidates["prompt"], unclear.candidates["completion"]
    if len(choices) < 2 or len(questions) != 1 or len(answers) != 1 or any(re.search(r"[{}]", key) for key in (*questions, *choices)):
        return "write each question with its choices as one text, in a column of its own, and name it in data.columns"
    prompt = "\n".join((f"{{{questions[0]}}}", *(f"{key}: {{{key}}}" for key in choices)))
    return setting(prompt=prompt, completion=answers[0] if isinstance(value[answers[0]], str) else f"{{{answers[0]}}}")


def _is_one_text(rows: Sequence[Row], key: str) -> bool:
    """Whether the only column is plain text: not lists as text, nor a table whose delimiter was not recognised."""
    cells = [str(row.value[key] or "") for row in rows]
    if any(cell.lstrip()[:1] in ("[", "{") for cell in cells):
        return False
    words = {word.lower() for word in key.split()}
    delimiters = {*re.findall(r"[^\w .-]+", key), *([" "] if words & {*PROMPT} and words & {*COMPLETION} else [])}
    return not any(all(delimiter in cell for cell in cells) for delimiter in delimiters)


def _text_columns(rows: Sequence[Row]) -> list[str]:
    """The keys that hold a text, or nothing, in every row."""
    cells = {key: [row.value.get(key) for row in rows] for key in rows[0].value}
    return [key for key, texts in cells.items() if any(texts) and all(text is None or isinstance(text, str) for text in texts)]


def _misspelt(columns: Sequence[str], known: Sequence[str]) -> list[str]:
    """The one column whose name is nearly a known one; none if there are several."""
    near = [key for key in columns if nearest(plain_name(key), known, cutoff=_SPELLING)]
    return near if len(near) == 1 else []
