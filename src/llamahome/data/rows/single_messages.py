"""Recognises rows that are one message of a conversation each, as databases and forums export them, and suggests how to join them.

Learned one by one as texts, such rows would teach questions as well as answers, and none of them in its conversation.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llamahome.data.files.commands import run_python, sibling
from llamahome.data.files.jsonrow import excerpt
from llamahome.data.files.kinds import ending
from llamahome.data.records import Row
from llamahome.data.rows.column_roles import ColumnRoles, find_roles, plain_name
from llamahome.data.rows.turns import MESSAGE_ROLES, SHAREGPT_ROLES, turn_list
from llamahome.errors import Problem

_SPEAKERS = ("role", "from", "speaker", "author", "sender")
_TEXTS = ("content", "text", "value", "message", "utterance")
_ROLES = frozenset((*MESSAGE_ROLES, *SHAREGPT_ROLES, "prompter", "ai", "customer", "agent"))
_CONVERSATIONS = frozenset(
    ("conversation_id", "conversation", "conv_id", "chat_id", "dialog_id", "dialogue_id", "thread_id", "session_id", "convo_id", "chat")
)
"""Names of the column that is the same in all messages of a conversation."""
_OF_LINES = "(json.loads(l) for l in open(sys.argv[1],encoding='utf-8-sig') if l.strip())"
_OF_TABLE = "csv.DictReader(open(sys.argv[1],encoding='utf-8-sig',newline=''))"
_JOIN = (
    "import csv,json,sys; c={{}}; "
    "[c.setdefault(r[sys.argv[2]],[]).append({{'role':r[sys.argv[3]],'content':r[sys.argv[4]]}}) for r in {rows}]; "
    "[print(json.dumps({{'messages':m}})) for m in c.values()]"
)


def single_messages(rows: Sequence[Row]) -> Problem | None:
    """The problem of rows that are single messages; None for other rows."""
    found = [keys for row in rows if (keys := _message(row.value)) is not None]
    if not found or 2 * len(found) <= len(rows):
        return None
    row = next(row for row in rows if _message(row.value) is not None)
    speaker, text = found[0]
    message = f"each row is one message of a conversation ({speaker}, {text}), and a row to learn from is a whole conversation"
    hint = _joining(row, speaker, text) or "write all messages of a conversation into a list `messages` of one row, in their order"
    shown = excerpt(json.dumps(row.value, ensure_ascii=False), row.line)
    return Problem(code="data.single-messages", message=message, where=row.where, excerpt=shown, hint=hint)


def _message(value: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns of the speaker and the text of a row that is one message; None for any other row."""
    names = {plain_name(key): key for key in value if isinstance(key, str)}
    speaker = next((names[name] for name in _SPEAKERS if name in names and str(value[names[name]]).strip().lower() in _ROLES), None)
    text = next((names[name] for name in _TEXTS if name in names and isinstance(value[names[name]], str)), None)
    if speaker is None or text is None or turn_list(value, {}) is not None or isinstance(find_roles(value), ColumnRoles):
        return None
    return speaker, text


def _joining(row: Row, speaker: str, text: str) -> str | None:
    """The command that joins the messages of each conversation; None if no column names the conversation, or one names a message before."""
    names = {plain_name(key): key for key in row.value if isinstance(key, str)}
    of_conversation = next((names[name] for name in names if name in _CONVERSATIONS), None)
    rows = {".csv": _OF_TABLE, ".jsonl": _OF_LINES, ".ndjson": _OF_LINES}.get(ending(row.source))
    if (
        of_conversation is None
        or any(name.startswith("parent") for name in names)
        or rows is None
        or row.source.lower().endswith((".gz", ".zst"))
    ):
        return None
    return run_python(
        _JOIN.format(rows=rows), row.source, of_conversation, speaker, text, output=sibling(row.source, "-conversations.jsonl")
    )
