r"""Other spellings of rows with two answers, rewritten as those that preferences.py reads.

{"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": "\n\nHuman: ..."}                      transcripts (Anthropic HH)
{"prompt": "\n\nHuman: ...\n\nAssistant:", "chosen": "...", "rejected": "..."}                     a transcript and its answers
{"messages": [...], "chosen": {"role": "assistant", ...}, "rejected": {...}}                       turns and their answers
{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}           OpenAI
"""

import re
from collections.abc import Mapping
from typing import Any

from llamahome.data.rows.turns import opened, turn_keys, turn_list

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_ANSWERING = ("assistant", "gpt", "model")


def spelled_out(value: Mapping[str, Any], columns: tuple[str, str], names: Mapping[str, str]) -> dict[str, Any]:
    """The row with its two answers as lists of messages, if it has one of these spellings; else as it is. `names` is data.columns."""
    value = dict(value)
    asked = value.get("input")
    if columns[0] == "preferred_output" and isinstance(asked, dict) and "messages" in asked:
        value |= {"prompt": asked["messages"]} | ({"tools": asked["tools"]} if asked.get("tools") else {})
        del value["input"]
    transcripts = [transcript(value.get(column)) for column in columns]
    if all(turns is not None for turns in transcripts):
        return value | dict(zip(columns, transcripts, strict=True))
    prompt = names.get("prompt", "prompt")
    before = transcript(value.get(prompt))
    if before is not None and before[-1] == {"role": "assistant", "content": ""}:
        answers = {column: value[column].strip() for column in columns if isinstance(value.get(column), str)}
        return value | {prompt: before[:-1]} | answers
    return value if "prompt" in names else value | _after_turns(value, columns, names)


def transcript(value: object) -> list[dict[str, Any]] | None:
    """The turns of a text that begins with `Human:` and marks each turn after an empty line; None for any other value."""
    if not isinstance(value, str) or not value.lstrip().startswith("Human:"):
        return None
    _, *parts = _SPEAKER.split("\n\n" + value.lstrip())
    if "Assistant" not in parts[::2]:
        return None
    return [{"role": _ROLES[speaker], "content": text.strip()} for speaker, text in zip(parts[::2], parts[1::2], strict=True)]


def _after_turns(value: Mapping[str, Any], columns: tuple[str, str], names: Mapping[str, str]) -> dict[str, Any]:
    """Each answer after the list of turns beside it, which ends before an answer; nothing if there is no such list."""
    key = turn_list({key: part for key, part in value.items() if key not in columns}, names)
    turns = opened(value.get(key)) if key is not None else None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return {}
    speaker, text = turn_keys(turns, ("role", "content"))
    if turns[-1].get(speaker) in _ANSWERING:
        return {}
    written = {}
    for column in columns:
        answer = opened(value.get(column))
        if isinstance(answer, str):
            answer = {speaker: "assistant", text: answer}
        if isinstance(answer, list) and answer and isinstance(answer[0], dict):
            if answer[0].get(speaker) not in _ANSWERING:
                continue  # a whole conversation already
            written[column] = [*turns, *answer]
        elif isinstance(answer, dict):
            written[column] = [*turns, answer]
    return written
