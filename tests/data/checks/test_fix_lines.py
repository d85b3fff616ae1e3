"""Several objects in a line become rows; compressed files are repaired like plain ones; a dry run shows the changes that --fix makes."""

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.checks.test_fix_whole import CASES

from llamahome.config.schema import DataConfig
from llamahome.data.checks.check import Request
from llamahome.data.checks.fix import CHANGES, Fixed, fix
from llamahome.errors import DataError

ROWS = [{"prompt": f"{number}?", "completion": f"It is {number}."} for number in range(6)]
TEXTS = [json.dumps(row) for row in ROWS]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def mend(path: str | Path, out: str | Path = "out.jsonl", **words: Any) -> Fixed:
    return fix(Request((str(path),), DataConfig()), Path(out), force=True, **words)


def lines_of(path: str | Path) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "line",
    ["{0}{1}{2}", "{0} {1}, {2}", "[{0}, {1},{2}]", " [ {0},{1},{2} ] ", "{0},{1},{2},"],
    ids=["side", "comma", "list", "wide", "end"],
)
@pytest.mark.parametrize("alone", [True, False])
def test_each_object_of_a_line_is_a_row_and_a_change(line: str, alone: bool) -> None:
    text = line.replace("{0}", TEXTS[0]).replace("{1}", TEXTS[1]).replace("{2}", TEXTS[2])
    before = [] if alone else [TEXTS[3]]
    Path("rows.jsonl").write_text("\n".join([*before, text]) + "\n")
    fixed = mend("rows.jsonl")
    assert lines_of("out.jsonl") == ([] if alone else [ROWS[3]]) + ROWS[:3]
    if fixed.changes.get("data.whole-table") is None:
        record = lines_of(f"out.jsonl{CHANGES}")
        assert [json.loads(entry["after"]) for entry in record] == ROWS[:3]
        assert {(entry["what"], entry["line"], entry["before"]) for entry in record} == {("mended", 2 - alone, text)}


@pytest.mark.parametrize(
    "line", ['[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]', TEXTS[1] + "]", "[1, 2]", "[]"]
)
def test_a_line_of_turns_or_of_no_objects_is_left_out(line: str) -> None:
    Path("rows.jsonl").write_text(f"{TEXTS[0]}\n{line}\n")
    assert mend("rows.jsonl").dropped == 1 and lines_of("out.jsonl") == ROWS[:1]


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_packed_file_is_mended_as_the_plain_one_and_the_copy_is_packed_as_its_name_says(name: str, ending: str) -> None:
    content = CASES[name][0]
    Path(name).write_bytes(content)
    packed = gzip.compress(content) if ending == ".gz" else pa.compress(content, codec="zstd", asbytes=True)
    Path(name + ending).write_bytes(packed)
    plain, other = mend(name), mend(name + ending, f"packed.jsonl{ending}")
    assert plain == other
    with pa.input_stream(f"packed.jsonl{ending}", compression="gzip" if ending == ".gz" else "zstd") as stream:
        assert stream.read() == Path("out.jsonl").read_bytes()
    records = [lines_of(f"{out}{CHANGES}") for out in ("out.jsonl", f"packed.jsonl{ending}")]
    assert [entry["source"] for entry in records[1]] == [name + ending] * len(records[0])
    assert [{**entry, "source": ""} for entry in records[0]] == [{**entry, "source": ""} for entry in records[1]]


ODD = ["{'prompt': 'a', 'completion': None}", '{"promt": "a", "completion": "b"}', "nothing", '{"a": 1}', "\ufeff" + TEXTS[2], "[]", ""]
PARTS = st.sampled_from([*TEXTS, TEXTS[0] + TEXTS[1], TEXTS[3] + TEXTS[2], f"[{TEXTS[4]},{TEXTS[5]}]", TEXTS[0][:-1] + ",}", *ODD])


@settings(deadline=None, max_examples=60)
@given(st.lists(PARTS, min_size=1, max_size=8), st.sampled_from(["", ".gz"]))
def test_a_dry_run_tells_the_changes_that_the_copy_records(lines: list[str], ending: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        content = "".join(f"{line}\n" for line in lines).encode()
        path, out, told = Path(folder, f"rows.jsonl{ending}"), Path(folder, "out.jsonl"), list[dict[str, Any]]()
        path.write_bytes(gzip.compress(content) if ending else content)
        try:
            shown = mend(path, out, preview=told.append)
        except DataError as error:
            assert not out.exists()
            with pytest.raises(DataError) as caught:
                mend(path, out)
            assert caught.value.problems == error.problems
            return
        assert not out.exists() and shown == mend(path, out)
        assert told == lines_of(f"{out}{CHANGES}")
        assert len(lines_of(out)) == shown.kept
