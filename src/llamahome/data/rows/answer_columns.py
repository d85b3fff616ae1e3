"""The value of data.columns that reads a row's question and answer as llamahome finds them, for help lines."""

from collections.abc import Mapping
from typing import Any

from llamahome.data.rows.column_roles import ColumnRoles, find_roles, system_column
from llamahome.data.rows.columns import setting
from llamahome.data.rows.turns import turn_list


def every_answer(value: Mapping[str, Any], answer: str) -> str:
    """The setting that reads the rows as if there was no label."""
    roles = find_roles(value)
    if answer == turn_list(value, {}) or not isinstance(roles, ColumnRoles):
        return setting(**turn_columns(value, answer))
    return setting(**role_columns(roles, answer))


def role_columns(roles: ColumnRoles, completion: str) -> dict[str, str]:
    """The value of data.columns that reads the question, with what it is about and its system text, and this answer."""
    system = {"system": roles.system} if roles.system else {}
    return {**system, "prompt": _prompt_of(roles), "completion": completion}


def turn_columns(value: Mapping[str, Any], turns: str) -> dict[str, str]:
    """The same for a list of turns."""
    system = system_column(value)
    return {**({"system": system} if system else {}), "messages": turns}


def _prompt_of(roles: ColumnRoles) -> str:
    """The question, with what it is about, as a value of data.columns."""
    return roles.prompt if not roles.context else "\n\n".join(f"{{{key}}}" for key in (roles.prompt, *roles.context))
