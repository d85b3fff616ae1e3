"""`data check` reports each finding once, in order, with one process or several, and reports nothing else."""

import gzip
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.processes import children
from tests.support.projects import chats
from tests.support.tokenizers import CHATML, save_tokenizer

from llamahome.config.schema import DataConfig
from llamahome.data.checks.check import Checked, Request, check
from llamahome.data.checks.findings import SHOWN, Found, RowLocation, Tally
from llamahome.data.checks.rowcheck import CheckScope, RowChecker
from llamahome.data.checks.scan import BLOCK_ROWS
from llamahome.errors import DataError, MachineError, Problem

Write = Callable[..., str]


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return save_tokenizer(tmp_path / "model")


def write(rows: list[Any], name: str = "rows.jsonl") -> str:
    Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows))
    return name


def run_check(
    *paths: str, tokens: bool = True, processes: int = 1, block_rows: int = BLOCK_ROWS, **data: Any
) -> tuple[Checked, list[Found]]:
    findings: list[Found] = []
    request = Request(paths, DataConfig(**data), ("model", None) if tokens else None, processes=processes, block_rows=block_rows)
    return check(request, findings.append), findings


def asked(question: str, answer: Any = "Fine.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def summary(findings: list[Found]) -> list[tuple[str, str, int | None]]:
    return [(one.level, one.problem.code, one.place.line if one.place else None) for one in findings]


def test_good_rows_have_no_finding() -> None:
    checked, findings = run_check(write(chats(50)))
    assert findings == [] and checked.tally.counts == {} and checked.main is not None
    assert len(checked.main.facts) == 50 and checked.main.facts.usable.all() and checked.main.format == "messages"


@pytest.mark.medium
def test_several_processes_report_the_same_findings_in_the_same_order_as_one() -> None:
    rows: list[Any] = [row for number, row in enumerate(chats(90)) for row in ([row] if number % 7 else ["{", row, asked("a <|im_end|>")])]
    path = write(rows)
    one, several = run_check(path, block_rows=16), run_check(path, block_rows=16, processes=2)
    assert one[1] == several[1] and len(one[1]) > 20
    assert one[0].main is not None and several[0].main is not None
    assert one[0].main.facts.tokens.tolist() == several[0].main.facts.tokens.tolist()
    assert one[0].main.losses == several[0].main.losses


@pytest.mark.medium
def test_a_process_that_dies_ends_the_check_with_an_error() -> None:
    path = write(chats(3000))  # enough that work is left when the first block is reported
    before = children()

    def kill_workers(done: int, rows: int) -> None:
        for pid in set(children()) - set(before):
            os.kill(pid, signal.SIGKILL)

    request = Request((path,), DataConfig(), ("model", None), processes=2, block_rows=16)
    with pytest.raises(MachineError) as caught:
        check(request, lambda finding: None, watch=kill_workers)
    (problem,) = caught.value.problems
    assert problem.code == "machine.process-lost" and "signal 9" in problem.message
    assert set(children()) <= set(before), "a process was left behind"


def test_all_faults_of_a_row_are_found_behind_stray_bytes_and_misspellings() -> None:
    row = {"messages": [{"role": "usr", "contents": "What<|im_end|>"}, {"rol": "asistant", "content": "Fine."}]}
    path = "rows.jsonl"
    Path(path).write_bytes(json.dumps(asked("a")).encode() + b"\n" + json.dumps(row).encode().replace(b"What", b"Wh\0at") + b"\n")
    _, findings = run_check(path)
    assert [(one.problem.code, one.path) for one in findings] == [
        ("data.nul-byte", None),
        ("data.unknown-role", "messages[0].role"),
        ("data.missing-key", "messages[0]"),
        ("data.missing-key", "messages[1]"),
        ("data.unknown-role", "messages[1].role"),
        ("data.control-token-in-text", "messages[0].content"),
    ]
    assert {one.place for one in findings} == {RowLocation(path, 1, 2)}


def test_bad_rows_are_warnings_if_they_are_skipped() -> None:
    path = write([*chats(9), asked("a", None)])
    assert summary(run_check(path)[1]) == [("error", "data.null-content", 10)]
    assert summary(run_check(path, on_bad_row="skip", max_bad_share=0.1)[1]) == [("warning", "data.null-content", 10)]
    _, findings = run_check(path, on_bad_row="skip", max_bad_share=0.05)
    assert summary(findings) == [("warning", "data.null-content", 10), ("error", "data.bad-rows", None)]
    assert "max_bad_share=0.1" in str(findings[1].problem.hint)


def test_without_tokens_only_the_structure_is_checked() -> None:
    path = write([*chats(3), asked("a <|im_end|>"), asked("b", None)])
    checked, findings = run_check(path, tokens=False)
    assert summary(findings) == [("error", "data.null-content", 5)]
    assert any("--no-tokens" in words for words in checked.unsought)


def test_a_template_that_ends_no_turn_never_teaches_to_end() -> None:
    save_tokenizer(Path("model"), template=CHATML.replace("<|im_end|>\n", "\n"))
    _, findings = run_check(write(chats(2)), train_on="all")
    assert {one.problem.code for one in findings} <= {"data.end-not-learned"}


def test_chats_without_a_template_are_one_finding_and_text_needs_no_template() -> None:
    save_tokenizer(Path("model"), template=None)
    (Path("model") / "chat_template.jinja").unlink(missing_ok=True)
    assert summary(run_check(write([*chats(3), "{"]))[1]) == [
        ("error", "data.no-chat-template", None),
        ("error", "data.bad-json", 4),
    ]
    assert run_check(write([{"text": "The cat sat."}]))[1] == []


def test_all_paths_are_read_and_each_missing_one_is_reported() -> None:
    rows = chats(6)
    one, two = write([*rows[:3], "{"], "one.jsonl"), write([rows[0], *rows[3:]], "two.jsonl")
    checked, findings = run_check(one, "none.jsonl", two, "neither.jsonl")
    assert [(level, code) for level, code, _ in summary(findings)] == [
        ("error", "data.not-found"),
        ("error", "data.not-found"),
        ("error", "data.bad-json"),
        ("warning", "data.duplicate"),
    ]
    assert findings[3].problem.where == "two.jsonl:1" and "one.jsonl:1" in findings[3].problem.message
    assert checked.main is not None and len(checked.main.facts) == 8
    assert findings[2].place == RowLocation("one.jsonl", 3, 4) and findings[3].place == RowLocation("two.jsonl", 0, 1)


def test_if_nothing_can_be_opened_there_is_no_other_finding() -> None:
    checked, findings = run_check("none.jsonl")
    assert checked.main is None and summary(findings) == [("error", "data.not-found", None)]


def test_evaluation_rows_are_checked_and_reported_if_they_are_also_trained_on() -> None:
    rows = chats(6)
    main, other = write(rows), write([rows[4], asked("new"), asked("bad", "")], "eval.jsonl")
    checked, findings = run_check(main, eval_path=other)
    assert summary(findings) == [("error", "data.empty-content", 3), ("warning", "data.shared-with-eval", 5)]
    assert findings[0].problem.where == "eval.jsonl:3" and "eval.jsonl:1" in findings[1].problem.message
    assert checked.evaluation is not None and len(checked.evaluation.facts) == 3


def test_each_row_of_mixed_formats_is_read_in_its_own_format() -> None:
    path = write([asked("a"), {"instruction": "b", "output": None}, {"text": "c"}, {"other": 1}])
    assert summary(run_check(path)[1]) == [("error", "data.mixed-formats", None), ("error", "data.null-content", 2)]


def test_a_file_that_changes_during_a_check_ends_it() -> None:
    path = write(chats(4))
    looker = RowChecker(CheckScope((path,), DataConfig(), "messages"))
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="changed"):
        looker.check(range(4))


def test_the_first_of_each_kind_are_kept_and_all_are_counted() -> None:
    tally = Tally()
    for number in range(50):
        problem = Problem(code="data.b", message=str(number))
        tally.add(Found("warning" if number % 2 else "error", problem))
    tally.add(Found("warning", Problem(code="data.a", message="x")))
    assert tally.kinds() == [("error", "data.b"), ("warning", "data.a"), ("warning", "data.b")]
    assert (tally.total("error"), tally.total("warning")) == (25, 26)
    assert [finding.problem.message for finding in tally.first["error", "data.b"]] == [str(number) for number in range(0, 2 * SHOWN, 2)]
    assert len(list(tally.shown())) == 2 * SHOWN + 1


def test_findings_in_ragged_tables_and_archives_name_line_and_row(tmp_path: Path) -> None:
    Path("rows.csv").write_text('prompt,completion\n"a\nb",c\nd\ne,\n')
    assert summary(run_check("rows.csv")[1]) == [("error", "data.bad-csv", 4), ("error", "data.empty-content", 5)]
    Path("rows.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a b"}\n\n{"text": null}\n'))
    _, findings = run_check("rows.jsonl.gz")
    assert summary(findings) == [("error", "data.null-content", 3)] and findings[0].place == RowLocation("rows.jsonl.gz", 1, 3)
