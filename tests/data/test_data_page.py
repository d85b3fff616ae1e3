"""What docs/data.md says about formats is true: each row in it is read as the page says, and its settings are accepted."""

import json
import re
from pathlib import Path

import pytest

from llamahome.config.load import load_config
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.detect import detect
from llamahome.data.rows.formats import FORMATS, understand

PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
OBJECTIVES = ("preference", "labelled", "prompts")
"""Formats that training.objective asks for."""
ROWS = dict(re.findall(r"^\| (\w+) \| `(\{.*?\})`", PAGE, flags=re.MULTILINE))


def test_every_format_is_shown() -> None:
    assert set(ROWS) == {*FORMATS, *OBJECTIVES}


@pytest.mark.parametrize("name", [*FORMATS, *OBJECTIVES])
def test_a_row_that_is_shown_is_read_in_its_format(name: str) -> None:
    row = Row(0, "rows.jsonl", 1, json.loads(ROWS[name]))
    assert detect([row], name if name in OBJECTIVES else "auto").name == name
    assert isinstance(understand(row, name), Conversation)


def test_the_chat_with_a_tool_is_read() -> None:
    shown = PAGE[PAGE.index('    {"messages"') :].partition("\n\n")[0]
    found = understand(Row(0, "rows.jsonl", 1, json.loads(shown)), "messages")
    assert isinstance(found, Conversation), found
    assert found.turns[1]["tool_calls"][0]["function"]["name"] == found.tools[0]["function"]["name"] == "clock"


def test_the_settings_that_are_shown_are_accepted() -> None:
    shown = re.findall(r"`--set (data\.[^`]*)`", PAGE)
    assert len(shown) >= 5
    for assignment in shown:
        if "NAME" not in assignment:
            load_config(assignments=[assignment.replace('"', "")])
