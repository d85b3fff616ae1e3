"""Arbitrary bytes: a check ends, reports every DataError as a finding, and reports an error exactly if training refuses."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.tokenizers import save_tokenizer

from llamahome.config.schema import DataConfig
from llamahome.data.checks.check import Request, check
from llamahome.data.checks.findings import Found
from llamahome.data.checks.fix import fix
from llamahome.data.prepare import prepare
from llamahome.data.text.tokens import load_tokenizer
from llamahome.errors import DataError, Problem


@pytest.fixture(autouse=True, scope="module")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder, before = tmp_path_factory.mktemp("fuzz"), Path.cwd()
    save_tokenizer(folder / "model")
    os.chdir(folder)
    yield
    os.chdir(before)


KEYS = "messages conversations role content from value instruction output prompt completion text tools weight x"
keys = st.sampled_from(KEYS.split())
words = st.sampled_from(
    ["user", "assistant", "system", "tool", "human", "gpt", "usr", "", " ", "<|im_end|>", "é", "cafÃ©", "\ufffd", "a b c", "\x00"]
)
values = st.recursive(
    words | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
turns = st.lists(st.fixed_dictionaries({"role": words, "content": words | values}), max_size=3)
rows = st.dictionaries(keys, values, max_size=3) | st.fixed_dictionaries({"messages": turns}) | values
good = st.tuples(words, words).map(
    lambda pair: {"messages": [{"role": "user", "content": f"Say {pair[0]}."}, {"role": "assistant", "content": f"It is {pair[1]}."}]}
)


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """A line of JSON, often with a few bytes put in, taken out or cut off."""
    line = json.dumps(draw(good | rows), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(line)))
        line = line[:at] + draw(st.binary(max_size=3)) + line[at + draw(st.integers(0, 3)) :]
    return line[: draw(st.integers(0, len(line)))] if draw(st.integers(0, 9)) == 0 else line


jsonl = st.lists(good.map(lambda row: json.dumps(row).encode()) | lines() | st.binary(max_size=12), max_size=6).map(b"\n".join)
cells = st.text(st.sampled_from('a,"\n\r;\t é'), max_size=6) | words
table = st.lists(st.lists(cells, min_size=1, max_size=3).map(",".join), max_size=5).map("\n".join)
csv = (table.map(lambda text: "prompt,completion\n" + text) | table).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(
    max_size=40
)


def findings(path: str, data: DataConfig) -> list[Found]:
    found: list[Found] = []
    check(Request((path,), data, ("model", None)), found.append)
    return found


def refusal(path: str, data: DataConfig) -> tuple[Problem, ...]:
    try:
        prepare(data, path, load_tokenizer("model"), say=lambda _: None)
    except DataError as error:
        return error.problems
    return ()


def agree(path: str, content: bytes, **chosen: Any) -> None:
    """A check and a preparation of these bytes say the same, and a cleaned copy is refused by neither."""
    Path(path).write_bytes(content)
    data = DataConfig(eval_split=0, **chosen)
    found, refused = findings(path, data), refusal(path, data)
    assert bool(refused) == any(one.level == "error" for one in found), (refused, found)
    told = {(one.problem.code, one.problem.where) for one in found}
    assert {(one.code, one.where) for one in refused} - told <= {("data.bad-rows", path)}
    out = Path("clean.jsonl")
    out.unlink(missing_ok=True)
    try:
        fix(Request((path,), data, ("model", None)), out, force=True)
    except DataError:
        assert refused and not out.exists()
        return
    assert [one for one in findings(str(out), data) if one.level == "error"] == [], content


EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
"""FUZZ_EXAMPLES=100000 makes a night of it."""
settled = settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@settled
@given(jsonl)
def test_lines_of_any_bytes(content: bytes) -> None:
    agree("rows.jsonl", content)


@pytest.mark.medium
@settled
@given(jsonl)
def test_lines_of_any_bytes_where_bad_rows_are_left_out(content: bytes) -> None:
    agree("skipped.jsonl", content, on_bad_row="skip", max_bad_share=0.5)


@pytest.mark.medium
@settled
@given(csv)
def test_tables_of_any_bytes(content: bytes) -> None:
    agree("rows.csv", content)


@pytest.mark.medium
@settled
@given(jsonl.map(lambda content: b"[" + content.replace(b"\n", b",\n") + b"]") | jsonl)
def test_arrays_of_any_bytes(content: bytes) -> None:
    agree("rows.json", content)
