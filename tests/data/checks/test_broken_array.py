"""The objects of a broken JSON array are taken out of it as they are: none is lost, none is changed, and a sound array is left alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamahome.config.schema import DataConfig
from llamahome.data.checks.broken_array import lines_of_array
from llamahome.data.checks.check import Request
from llamahome.data.checks.fix import fix

ROWS = [{"prompt": f"a, {number} [", "completion": 'say "}",\n// no comment'} for number in range(3)]
OBJECTS = [json.dumps(row) for row in ROWS]
PRETTY = [json.dumps(row, indent=2) for row in ROWS]
BROKEN = {
    "a comma before the end": f"[{', '.join(OBJECTS)},\n]\n",
    "a comma too few": f"[{OBJECTS[0]}\n{OBJECTS[1]},\n{OBJECTS[2]}]",
    "two commas": f"[\n{OBJECTS[0]},,{OBJECTS[1]},{OBJECTS[2]}\n]",
    "a comma at the beginning": f"[,{','.join(PRETTY)}]",
    "comments": f"[ // rows\n{OBJECTS[0]}, /* the\nsecond */ {PRETTY[1]},\n// last\n{OBJECTS[2]}]",
    "no end": "[" + ",\n".join(PRETTY),
    "text after the end": f"[{','.join(OBJECTS)}]\n\nend of file",
}


@pytest.mark.parametrize("what", BROKEN)
def test_all_objects_are_in_the_cleaned_copy(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        Path("rows.json").write_text(BROKEN[what], encoding=encoding)
        fixed = fix(Request(("rows.json",), DataConfig()), Path("clean.jsonl"), force=True)
        assert [json.loads(line) for line in Path("clean.jsonl").read_text().splitlines()] == ROWS and fixed.dropped == 0
    assert Path("rows.json").read_text(encoding="utf-16") == BROKEN[what]


def test_an_object_that_is_cut_off_is_recorded_as_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text(f"[\n{OBJECTS[0]},\n{OBJECTS[1]},\n{OBJECTS[2][:20]}")
    fixed = fix(Request(("rows.json",), DataConfig()), Path("clean.jsonl"))
    changes = [json.loads(line) for line in Path("clean.jsonl.changes.jsonl").read_text().splitlines()]
    assert (fixed.kept, fixed.dropped) == (2, 1)
    assert [(change["what"], change["line"]) for change in changes] == [("mended", 1), ("dropped", 4)]


@pytest.mark.parametrize("text", ["[]", "[\n]", "[1, 2,]", '["a",]', f"[[{OBJECTS[0]}],]", "{}", "", '{"rows": [{}]', *OBJECTS])
def test_nothing_else_is_taken_for_a_broken_array(text: str) -> None:
    assert lines_of_array(text) is None


VALUES = st.recursive(st.text(max_size=9) | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@pytest.mark.medium
@given(st.lists(st.dictionaries(st.text(max_size=5), VALUES), min_size=1, max_size=4), st.booleans(), st.sampled_from([None, 1]))
def test_objects_with_any_values_are_found(rows: list[dict[str, Any]], ascii_only: bool, indent: int | None) -> None:
    sound = json.dumps(rows, ensure_ascii=ascii_only, indent=indent)
    assert lines_of_array(sound) is None
    lines = lines_of_array(sound[:-1].rstrip() + ",]") or ""
    assert [json.loads(line) for line in lines.split("\n") if line] == rows
