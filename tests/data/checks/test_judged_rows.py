"""Pairs and labelled answers are duplicates only if what is said of the answers is the same too, and the cleaned copy loses none."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.projects import write_rows
from tests.support.tokenizers import save_tokenizer

from llamahome.config.schema import DataConfig
from llamahome.data.checks.check import Request, check
from llamahome.data.checks.findings import Found
from llamahome.data.checks.fix import fix
from llamahome.data.prepare import prepare
from llamahome.data.text.tokens import load_tokenizer

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5")))
PAIRS: list[dict[str, Any]] = [
    {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    {"prompt": "2+2?", "chosen": "4", "rejected": "6"},
    {"prompt": "2+2?", "chosen": "5", "rejected": "4"},
    {"chosen": [USER, GOOD], "rejected": [USER, {**BAD, "content": "7"}]},
]
LABELLED: list[dict[str, Any]] = [
    {"prompt": "2+2?", "completion": "4", "label": True},
    {"prompt": "2+2?", "completion": "4", "label": False},
    {"messages": [USER, BAD], "label": 0},
]


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "model")


@pytest.mark.parametrize(("format_name", "rows"), [("preference", PAIRS), ("labelled", LABELLED)], ids=["pairs", "labelled"])
@pytest.mark.parametrize("tokens", [True, False])
def test_only_rows_with_the_same_judgement_are_duplicates(format_name: str, rows: list[dict[str, Any]], tokens: bool) -> None:
    write_rows(Path("rows.jsonl"), [*rows, *rows])
    found: list[Found] = []
    request = Request(("rows.jsonl",), DataConfig(format=format_name), ("model", None) if tokens else None)
    check(request, found.append)
    assert [each.problem.where for each in found] == [f"rows.jsonl:{len(rows) + number}" for number in range(1, len(rows) + 1)]
    assert {each.problem.code for each in found} == {"data.duplicate"}
    fix(request, Path("clean.jsonl"))
    assert [json.loads(line) for line in Path("clean.jsonl").read_text().splitlines()] == rows
    assert len(Path("clean.jsonl.changes.jsonl").read_text().splitlines()) == len(rows)


@pytest.mark.parametrize("code", ["data.overlong", "data.too-much-lost", "data.no-targets"])
def test_the_max_length_that_keeps_a_pair_is_that_of_its_longer_answer_with_the_prompt(code: str) -> None:
    """Not that of both together."""
    asked = "the cat sat on the mat " * (40 if code == "data.no-targets" else 2)
    write_rows(Path("alone.jsonl"), [{"prompt": asked, "completion": "the cat " * 30}])
    write_rows(Path("rows.jsonl"), [{"prompt": asked, "chosen": "the cat " * 30, "rejected": "no"}])
    limits: dict[str, Any] = {"format": "preference", "eval_split": 0}
    alone, whole = (
        prepare(DataConfig(**data), path, load_tokenizer("model"), say=lambda _: None).report
        for path, data in (("alone.jsonl", {"eval_split": 0}), ("rows.jsonl", limits))
    )
    assert whole.longest_tokens == alone.longest_tokens and whole.overlong_truncated == 0
    found: list[Found] = []
    check(Request(("rows.jsonl",), DataConfig(**limits, max_length=60), ("model", None)), found.append)
    problem = next(each.problem for each in found if each.problem.code == code)
    assert f"--set data.max_length={whole.longest_tokens} keeps all" in problem.hint
    assert code != "data.overlong" or f"{whole.longest_tokens:,} tokens, more than" in problem.message
