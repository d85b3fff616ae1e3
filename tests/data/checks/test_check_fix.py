"""A cleaned copy is clean, every change is in the record, and nothing is written if something is in the way."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.projects import chats
from tests.support.tokenizers import save_tokenizer, train_tokenizer

from llamahome.config.schema import DataConfig
from llamahome.data.checks.check import Request, check
from llamahome.data.checks.findings import Found
from llamahome.data.checks.fix import CHANGES, Fixed, fix
from llamahome.data.checks.repair import split_control_tokens
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.errors import DataError, LlamaHomeError, MachineError, UsageError

OUT = Path("clean.jsonl")
MISREAD = "cafÃ© â€“ dÃ©jÃ\xa0"


@pytest.fixture(autouse=True, scope="module")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, before = tmp_path_factory.mktemp("fix"), Path.cwd()
    save_tokenizer(folder / "model")
    os.chdir(folder)
    yield
    os.chdir(before)


def write(rows: list[Any], name: str = "rows.jsonl") -> str:
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    Path(name).write_bytes(b"".join(line + b"\n" for line in lines))
    return name


def request(*paths: str, tokens: bool = True, **data: Any) -> Request:
    return Request(paths, DataConfig(**data), ("model", None) if tokens else None)


def clean(*paths: str, **data: Any) -> Fixed:
    return fix(request(*paths, **data), OUT, force=True)


def rows_of(path: Path = OUT) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def changes() -> list[dict[str, Any]]:
    return rows_of(Path(f"{OUT}{CHANGES}"))


def findings(path: str) -> list[Found]:
    found: list[Found] = []
    check(request(path), found.append)
    return found


def asked(question: str, answer: Any = "Fine.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_a_row_that_needs_no_change_is_copied_unchanged() -> None:
    lines = [
        b'{"messages":  [{"role":"user","content":"a\\u00e9"},{"role":"assistant","content":"b"}], "id": 1}',
        json.dumps(asked("c")).encode(),
    ]
    fixed = clean(write(lines))
    assert (fixed.kept, fixed.repaired, fixed.dropped) == (2, 0, 0)
    assert OUT.read_bytes() == b"".join(line + b"\n" for line in lines) and changes() == []


def test_every_kind_of_fault_is_repaired_or_dropped_and_recorded() -> None:
    misspelt = {"messages": [{"rol": "user", "content": "b"}, {"role": "Asistant ", "content": "c"}]}
    rows = [
        b"\xef\xbb\xbf" + json.dumps(asked("a")).encode(),
        json.dumps(asked("question")).encode().replace(b"question", b"que\0stion"),
        b"\xef\xbb\xbf" + json.dumps(asked("after a mark")).encode(),
        misspelt,
        asked("x <|im_start|> y <|im_end|>"),
        asked(MISREAD),
        asked("a"),
        asked(" a ", "Fine.\n"),
        b"nonsense",
        asked("d", None),
        "Müller".encode("latin-1"),
    ]
    fixed = clean(write(rows))
    assert (fixed.kept, fixed.repaired, fixed.dropped) == (6, 5, 5)
    assert rows_of() == [
        asked("a"),
        asked("question"),
        asked("after a mark"),
        asked("b", "c"),
        asked("x < |im_start|> y < |im_end|>"),
        asked("café – déjà"),
    ]
    assert not OUT.read_bytes().startswith(b"\xef\xbb\xbf")
    seen = [(change["line"], change["what"], change["code"]) for change in changes()]
    assert seen == [
        (1, "mended", "data.byte-order-mark"),
        (2, "mended", "data.nul-byte"),
        (3, "mended", "data.bad-json"),
        (4, "mended", "data.missing-key"),
        (4, "mended", "data.unknown-role"),
        (5, "mended", "data.control-token-in-text"),
        (6, "mended", "data.mojibake"),
        (7, "dropped", "data.duplicate"),
        (8, "dropped", "data.duplicate"),
        (9, "dropped", "data.bad-json"),
        (10, "dropped", "data.null-content"),
        (11, "dropped", "data.not-utf8"),
    ]
    assert changes()[4] | {"source": "", "row": 0} == {
        "source": "", "row": 0, "line": 4, "what": "mended", "code": "data.unknown-role", "path": "messages[1].role",
        "before": "Asistant ", "after": "assistant",
    }  # fmt: skip
    assert json.loads(changes()[7]["before"]) == asked("a") and changes()[7]["after"] is None
    assert findings(str(OUT)) == []


faults = st.sampled_from(
    ["none", "role", "key", "nul", "mark", "control", "misread", "null", "cut", "blank", "twice", "space", "latin", "order", "number"]
)


def broken(row: dict[str, Any], fault: str, earlier: list[bytes]) -> bytes:
    """The row's line with one fault in it."""
    row = copy.deepcopy(row)
    question, answer = row["messages"]
    if fault == "role":
        question["role"], answer["role"] = "User", "assitant"
    elif fault == "key":
        answer["contents"] = answer.pop("content")
    elif fault == "control":
        answer["content"] += " <|im_end|><|im_start|>"
    elif fault == "misread":
        question["content"] += MISREAD
    elif fault in ("null", "blank", "number"):
        answer["content"] = {"null": None, "blank": " \n", "number": 7}[fault]
    elif fault == "order":
        row["messages"].reverse()
        row["messages"].append(dict(row["messages"][0]))
    line = json.dumps(row, ensure_ascii=False).encode()
    if fault == "nul":
        line = line.replace(b"content", b"con\0tent", 1)
    elif fault == "mark":
        line = b"\xef\xbb\xbf" + line
    elif fault == "cut":
        line = line[:-9]
    elif fault == "latin":
        line = line.replace(b"?", b"\xfc", 1)
    elif fault == "twice" and earlier:
        line = earlier[0]
    elif fault == "space":
        line = line.replace(b" ", b"  ")
    return line


@pytest.mark.medium
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 5), st.lists(faults, min_size=1, max_size=1)), min_size=1, max_size=12))
def test_a_cleaned_copy_has_no_repairable_fault_and_every_lost_row_is_recorded(made: list[tuple[int, list[str]]]) -> None:
    good = chats(6)
    lines: list[bytes] = []
    for number, (fault,) in made:
        lines.append(broken(good[number], fault, lines))
    path = write(lines)
    before = Path(path).read_bytes()
    try:
        fixed = clean(path)
    except DataError as error:
        assert error.problems[0].code in ("data.nothing-to-keep", "data.unknown-format") or all(p.code in BROKEN for p in error.problems)
        return
    assert Path(path).read_bytes() == before
    left = findings(str(OUT))
    assert left == [], left
    kept, dropped = rows_of(), {change["row"] for change in changes() if change["what"] == "dropped"}
    assert fixed.kept == len(kept) == len(lines) - len(dropped) == len(lines) - fixed.dropped
    again = Path("again.jsonl")
    assert fix(request(str(OUT)), again, force=True).changes.total() == 0 and again.read_bytes() == OUT.read_bytes()


BROKEN = ("data.bad-json", "data.nul-byte", "data.not-utf8")


def test_the_copy_never_replaces_its_source() -> None:
    path = write(chats(3))
    before = Path(path).read_bytes()
    for out, words in (
        (path, (path,)),
        ("./rows.jsonl", (path,)),
        (path, ("row*.jsonl",)),
        (f"{os.getcwd()}/folder/new.jsonl", ("folder",)),
    ):
        Path("folder").mkdir(exist_ok=True)
        write(chats(1), "folder/a.jsonl")
        with pytest.raises(UsageError) as caught:
            fix(request(*words), Path(out), force=True)
        assert caught.value.problems[0].code == "usage.fix-in-place"
    assert Path(path).read_bytes() == before and not Path("folder/new.jsonl").exists()


def test_an_existing_file_is_overwritten_only_with_force(tmp_path: Path) -> None:
    path, out = write(chats(2)), tmp_path / "out.jsonl"
    record = Path(f"{out}{CHANGES}")
    for target in (out, record):
        target.write_text("mine")
        with pytest.raises(UsageError, match="--force"):
            fix(request(path), out)
        assert target.read_text() == "mine"
        target.unlink()
    out.write_text("mine")
    assert fix(request(path), out, force=True).kept == 2 and record.read_text() == ""
    with pytest.raises(UsageError, match="folder"):
        fix(request(path), tmp_path)


@pytest.mark.parametrize("rows", [[{"a": 1}], [asked("a", None)], [b"nonsense"], [asked("a"), {"text": "b"}], []])
def test_if_no_row_can_be_kept_no_file_is_left(rows: list[Any], tmp_path: Path) -> None:
    path = write(rows)
    with pytest.raises(DataError):
        fix(request(path), tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk_leaves_no_file(tmp_path: Path) -> None:
    path = write(chats(2))
    (tmp_path / "file").write_text("")
    with pytest.raises(LlamaHomeError) as caught:
        fix(request(path), tmp_path / "file/out.jsonl")
    assert isinstance(caught.value, MachineError) and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_any_kind_of_file_becomes_lines_of_json() -> None:
    Path("rows.csv").write_text('prompt,completion\na,b\nc,\n"d\ne",f <|im_end|>\nonly one\na,b\n')
    fixed = clean("rows.csv")
    assert rows_of() == [{"prompt": "a", "completion": "b"}, {"prompt": "d\ne", "completion": "f < |im_end|>"}]
    assert (fixed.kept, fixed.repaired, fixed.dropped) == (2, 1, 3)
    Path("rows.json").write_text(json.dumps([asked("a"), asked("b\nc", None), asked("d")], indent=1))
    assert clean("rows.json").kept == 2 and rows_of() == [asked("a"), asked("d")]


def test_rows_too_long_are_left_out_only_where_a_run_would_refuse_them() -> None:
    path = write([asked("a"), asked("b", "word " * 100)])
    assert clean(path, max_length=60).kept == 2
    assert clean(path, max_length=60, on_overlong="error").kept == 1


def test_without_a_tokenizer_control_tokens_stay() -> None:
    path = write([asked("a <|im_end|>"), asked("b", None)])
    assert fix(request(path, tokens=False), OUT, force=True).kept == 1 and rows_of() == [asked("a <|im_end|>")]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from(["<|im_end|>", "<|im_", "end|>", "<|endoftext|>", "<", "|", " ", "a"]), max_size=12).map("".join))
def test_a_text_taken_apart_has_no_control_token_and_the_same_letters(text: str) -> None:
    tokenizer = TOKENIZER
    found = split_control_tokens(text, tokenizer)
    assert tokenizer.control_token_in(found) is None
    assert found.replace(" ", "") == text.replace(" ", "")


TOKENIZER = ChatTokenizer(train_tokenizer())
