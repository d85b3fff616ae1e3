"""Bad input of every kind: a check finds what is wrong, and training refuses the same."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.support.corpus import CORPUS, TABLE, Case, cases, write_unreadable_as_text
from tests.support.models import save_tiny

from llamahome import pipeline
from llamahome.cli.data import data_app
from llamahome.config.load import load_config
from llamahome.errors import DataError, Problem

CASES = cases()
NOT_OF_ROWS = ("data.no-targets", "data.too-much-lost", "data.mixture-empty")
"""What settings do to them; no row is wrong."""
OF_SETTINGS = {"data.mixture-empty": "data.mixture"}
WORDS = ("model.name=tiny", "data.eval_split=0", "training.batch_size=1", "training.max_steps=1", "evaluation.sample_prompts=0")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `tiny` and the files that cannot lie in the repository as text."""
    folder = tmp_path_factory.mktemp("corpus")
    save_tiny(folder / "data/models/base/tiny")
    write_unreadable_as_text(folder)
    return folder


@pytest.fixture(autouse=True)
def _here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(project)
    yield


def path_of(case: Case) -> str:
    return str(CORPUS / case.file) if (CORPUS / case.file).exists() else case.file


def settings(case: Case) -> list[str]:
    return [word for text in (*WORDS, *case.settings) for word in ("--set", text)]


def checked(case: Case, *words: str) -> tuple[int, list[dict[str, object]]]:
    """Exit status and findings of `data check --json`."""
    result = CliRunner().invoke(data_app, ["check", path_of(case), "--json", "--no-quality", *settings(case), *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, [json.loads(line) for line in result.stdout.splitlines()]


def refusal(case: Case) -> tuple[Problem, ...]:
    """The problems for which `train` refuses the file; none when it trains."""
    try:
        pipeline.train(path_of(case), load_config((), assignments=[*WORDS, *case.settings]))
    except DataError as error:
        return error.problems
    return ()


def named(case: Case) -> str:
    return " ".join((case.file, *case.settings))


@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_check_finds_what_is_wrong_where_it_is(case: Case) -> None:
    status, findings = checked(case)
    assert status == (3 if case.refused else 0)
    for finding, expected in zip(findings, case.finds, strict=True):
        where = re.search(r":(?:row )?(\d+)(?: \(row \d+\))?$", str(finding["where"]))
        line = int(where[1]) if where else None
        assert (finding["level"], finding["code"], line, finding["path"]) == (expected.level, expected.code, expected.line, expected.path)
        assert expected.words in str(finding["message"]).replace(path_of(case), case.file)
        place = OF_SETTINGS.get(expected.code, path_of(case))
        assert str(finding["where"]).startswith(place)
        assert (finding["source"], finding["line"]) == (place, line)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_training_refuses_exactly_what_a_check_calls_an_error(case: Case) -> None:
    reported = {(one["code"], one["where"]) for one in checked(case)[1]}
    problems = refusal(case)
    assert bool(problems) == case.refused
    assert {(problem.code, problem.where) for problem in problems} - reported <= {("data.bad-rows", path_of(case))}, "their number"


@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_cleaned_copy_is_not_refused(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "clean.jsonl"
    words = ["check", path_of(case), "--no-quality", "--fix", str(out), *settings(case)]
    result = CliRunner().invoke(data_app, words)
    assert result.exception is None or isinstance(result.exception, SystemExit | DataError)
    if not out.exists():
        assert case.refused and not list(tmp_path.iterdir()), "nothing is left where nothing could be written"
        return
    assert result.exit_code == (3 if case.refused else 0)
    again = CliRunner().invoke(data_app, ["check", str(out), "--no-quality", "--json", *settings(case)])
    left = [json.loads(line) for line in again.stdout.splitlines()]
    assert [finding for finding in left if finding["level"] == "error" and finding["code"] not in NOT_OF_ROWS] == []
    changes = [json.loads(line) for line in (tmp_path / "clean.jsonl.changes.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {change["what"] for change in changes} <= {"mended", "dropped"}


def test_the_corpus_is_large_and_the_table_lists_every_file() -> None:
    assert len(CASES) >= 60
    assert {case.file for case in CASES} >= {path.name for path in CORPUS.iterdir()} - {TABLE.name}
