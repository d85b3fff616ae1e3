"""The sample is the same every time, its first rows are a part of it, and every row can be learned from."""

import ast
import email
import json
import sysconfig
from pathlib import Path

import pytest

from llamahome.data.records import Conversation, Row
from llamahome.data.rows.formats import understand
from llamahome.data.sample import _pairs, write_sample
from llamahome.errors import MachineError


@pytest.mark.medium
def test_every_row_of_the_library_can_be_learned_from(tmp_path: Path) -> None:
    count = write_sample(tmp_path / "all.jsonl", rows=None)
    lines = (tmp_path / "all.jsonl").read_text().splitlines()
    assert len(lines) == count == len(set(lines)) and count > 3000
    for number, line in enumerate(lines):
        found = understand(Row(number, "all.jsonl", number + 1, json.loads(line)), "messages")
        assert isinstance(found, Conversation)
        question, answer = (turn["content"] for turn in found.turns)
        assert len(answer) >= 20 and answer not in question and "<|" not in question + answer
    assert [path.name for path in tmp_path.iterdir()] == ["all.jsonl"]


def test_the_first_rows_are_the_first_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = {"stdlib": str(Path(email.__file__).parent)}  # a small part of the library, for speed
    monkeypatch.setattr(sysconfig, "get_paths", lambda: library)
    count = write_sample(tmp_path / "all.jsonl", rows=None)
    assert write_sample(tmp_path / "new" / "some.jsonl", rows=20) == 20 < count
    assert (tmp_path / "new" / "some.jsonl").read_text().splitlines() == (tmp_path / "all.jsonl").read_text().splitlines()[:20]


SOURCE = '''
class A:
    @property
    def method(self):
        """Say what this method is good for.

            Deeper.
        """

        return 1

    def short(self):
        """Too short."""
        return 2

    def alone(self):
        """Nothing but a docstring, so there is nothing to describe."""

def inline(): """A docstring on the line of its function."""; return 3

def control(self):
    """Reads the <filename> of the thing that is asked for."""
    return 4

async def waits():
    """Wait until it is over, which may take a while."""
    def inner():
        """Count the things that are inside of the other."""
        return 5
'''


def test_a_pair_is_the_function_without_its_docstring_and_the_docstring(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    pairs = list(_pairs(tmp_path / "a.py"))
    assert [answer.split()[0] for _, answer in pairs] == ["Wait", "Say", "Count"]
    question, answer = pairs[1]
    assert answer == "Say what this method is good for.\n\nDeeper."
    code = question.split("```python\n")[1].removesuffix("\n```")
    assert code == "@property\ndef method(self):\n    return 1"
    ast.parse(code)


def test_what_cannot_be_parsed_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def broken(:\n")
    (tmp_path / "b.py").write_bytes(b"# \xff\n")
    assert list(_pairs(tmp_path / "a.py")) == list(_pairs(tmp_path / "b.py")) == []


def test_a_place_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MachineError, match=r"machine\.cannot-write"):
        write_sample(tmp_path / "file" / "a.jsonl", rows=1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
