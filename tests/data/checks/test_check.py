"""What `data check` tells: each finding once, in order, by one process as by several, and only what is there."""

import gzip
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.projects import chats
from tests.support.tokenizers import CHATML, save_tokenizer

from llamahome.config.schema import DataConfig
from llamahome.data.checks.check import Checked, Request, check
from llamahome.data.checks.findings import SHOWN, Found, Place, Tally
from llamahome.data.checks.rowcheck import Looker, Scope
from llamahome.errors import DataError, MachineError, Problem

Write = Callable[..., str]


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return save_tokenizer(tmp_path / "model")


def write(rows: list[Any], name: str = "rows.jsonl") -> str:
    Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows))
    return name


def look(*paths: str, tokens: bool = True, processes: int = 1, **data: Any) -> tuple[Checked, list[Found]]:
    found: list[Found] = []
    request = Request(paths, DataConfig(**data), ("model", None) if tokens else None, processes=processes)
    return check(request, found.append), found


def asked(question: str, answer: Any = "Fine.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def told(found: list[Found]) -> list[tuple[str, str, int | None]]:
    return [(one.level, one.problem.code, one.place.line if one.place else None) for one in found]


def test_rows_without_a_fault_have_no_finding() -> None:
    checked, found = look(write(chats(50)))
    assert found == [] and checked.tally.counts == {} and checked.main is not None
    assert len(checked.main.facts) == 50 and checked.main.facts.usable.all() and checked.main.format == "messages"


def test_several_processes_find_what_one_finds_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamahome.data.checks.survey._STRETCH", 16)
    rows: list[Any] = [row for number, row in enumerate(chats(90)) for row in ([row] if number % 7 else ["{", row, asked("a <|im_end|>")])]
    path = write(rows)
    one, several = look(path), look(path, processes=2)
    assert one[1] == several[1] and len(one[1]) > 20
    assert one[0].main is not None and several[0].main is not None
    assert one[0].main.facts.tokens.tolist() == several[0].main.facts.tokens.tolist()
    assert one[0].main.losses == several[0].main.losses


def test_a_process_that_dies_ends_the_check_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamahome.data.checks.survey._STRETCH", 16)
    path = write(chats(3000))  # enough that work is left when the first stretch is told

    def told_of(done: int, rows: int) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    request = Request((path,), DataConfig(), ("model", None), processes=2)
    with pytest.raises(MachineError) as caught:
        check(request, lambda found: None, watch=told_of)
    assert caught.value.problems[0].code == "machine.process-lost"


def test_a_failing_row_is_found_behind_its_stray_bytes_and_its_misspellings() -> None:
    row = {"messages": [{"role": "usr", "contents": "What<|im_end|>"}, {"rol": "asistant", "content": "Fine."}]}
    path = "rows.jsonl"
    Path(path).write_bytes(json.dumps(asked("a")).encode() + b"\n" + json.dumps(row).encode().replace(b"What", b"Wh\0at") + b"\n")
    _, found = look(path)
    assert [(one.problem.code, one.path) for one in found] == [
        ("data.nul-byte", None),
        ("data.unknown-role", "messages[0].role"),
        ("data.missing-key", "messages[0]"),
        ("data.missing-key", "messages[1]"),
        ("data.unknown-role", "messages[1].role"),
        ("data.control-token-in-text", "messages[0].content"),
    ]
    assert {one.place for one in found} == {Place(path, 1, 2)}


def test_bad_rows_are_warnings_where_they_are_left_out() -> None:
    path = write([*chats(9), asked("a", None)])
    assert told(look(path)[1]) == [("error", "data.null-content", 10)]
    assert told(look(path, on_bad_row="skip", max_bad_share=0.1)[1]) == [("warning", "data.null-content", 10)]
    _, found = look(path, on_bad_row="skip", max_bad_share=0.05)
    assert told(found) == [("warning", "data.null-content", 10), ("error", "data.bad-rows", None)]
    assert "max_bad_share=0.1" in str(found[1].problem.hint)


def test_without_tokens_only_the_structure_is_looked_at() -> None:
    path = write([*chats(3), asked("a <|im_end|>"), asked("b", None)])
    checked, found = look(path, tokens=False)
    assert told(found) == [("error", "data.null-content", 5)]
    assert any("--no-tokens" in words for words in checked.unsought)


def test_a_template_that_ends_no_turn_never_teaches_to_end() -> None:
    save_tokenizer(Path("model"), template=CHATML.replace("<|im_end|>\n", "\n"))
    _, found = look(write(chats(2)), train_on="all")
    assert {one.problem.code for one in found} <= {"data.end-not-learned"}


def test_a_chat_without_a_template_is_told_once_and_text_needs_none() -> None:
    save_tokenizer(Path("model"), template=None)
    (Path("model") / "chat_template.jinja").unlink(missing_ok=True)
    assert told(look(write([*chats(3), "{"]))[1]) == [("error", "data.no-chat-template", None), ("error", "data.bad-json", 4)]
    assert look(write([{"text": "The cat sat."}]))[1] == []


def test_all_paths_are_read_and_those_that_are_not_there_are_all_told() -> None:
    rows = chats(6)
    one, two = write([*rows[:3], "{"], "one.jsonl"), write([rows[0], *rows[3:]], "two.jsonl")
    checked, found = look(one, "none.jsonl", two, "neither.jsonl")
    assert [(level, code) for level, code, _ in told(found)] == [
        ("error", "data.not-found"),
        ("error", "data.not-found"),
        ("error", "data.bad-json"),
        ("warning", "data.duplicate"),
    ]
    assert found[3].problem.where == "two.jsonl:1" and "one.jsonl:1" in found[3].problem.message
    assert checked.main is not None and len(checked.main.facts) == 8
    assert found[2].place == Place("one.jsonl", 3, 4) and found[3].place == Place("two.jsonl", 0, 1)


def test_when_nothing_can_be_opened_that_is_all_there_is_to_tell() -> None:
    checked, found = look("none.jsonl")
    assert checked.main is None and told(found) == [("error", "data.not-found", None)]


def test_rows_of_the_evaluation_data_are_checked_and_told_where_training_has_them() -> None:
    rows = chats(6)
    main, other = write(rows), write([rows[4], asked("new"), asked("bad", "")], "eval.jsonl")
    checked, found = look(main, eval_path=other)
    assert told(found) == [("error", "data.empty-content", 3), ("warning", "data.shared-with-eval", 5)]
    assert found[0].problem.where == "eval.jsonl:3" and "eval.jsonl:1" in found[1].problem.message
    assert checked.evaluation is not None and len(checked.evaluation.facts) == 3


def test_each_row_of_mixed_formats_is_read_in_its_own() -> None:
    path = write([asked("a"), {"instruction": "b", "output": None}, {"text": "c"}, {"other": 1}])
    assert told(look(path)[1]) == [("error", "data.mixed-formats", None), ("error", "data.null-content", 2)]


def test_a_file_that_changes_meanwhile_ends_the_check() -> None:
    path = write(chats(4))
    looker = Looker(Scope((path,), DataConfig(), "messages"))
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="changed"):
        looker.look(range(4))


def test_the_first_of_each_kind_are_kept_and_all_are_counted() -> None:
    tally = Tally()
    for number in range(50):
        problem = Problem(code="data.b", message=str(number))
        tally.add(Found("warning" if number % 2 else "error", problem))
    tally.add(Found("warning", Problem(code="data.a", message="x")))
    assert tally.kinds() == [("error", "data.b"), ("warning", "data.a"), ("warning", "data.b")]
    assert (tally.total("error"), tally.total("warning")) == (25, 26)
    assert [found.problem.message for found in tally.first["error", "data.b"]] == [str(number) for number in range(0, 2 * SHOWN, 2)]
    assert len(list(tally.shown())) == 2 * SHOWN + 1


def test_ragged_tables_and_archives_are_told_by_line_and_row(tmp_path: Path) -> None:
    Path("rows.csv").write_text('prompt,completion\n"a\nb",c\nd\ne,\n')
    assert told(look("rows.csv")[1]) == [("error", "data.bad-csv", 4), ("error", "data.empty-content", 5)]
    Path("rows.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a b"}\n\n{"text": null}\n'))
    _, found = look("rows.jsonl.gz")
    assert told(found) == [("error", "data.null-content", 3)] and found[0].place == Place("rows.jsonl.gz", 1, 3)
