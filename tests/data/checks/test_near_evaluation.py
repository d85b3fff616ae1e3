"""Rows to train on that are nearly those of the evaluation data are found, and only those; boilerplate in answers is told."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from llamahome.cli.data import data_app
from llamahome.data.checks.duplicates import PERMUTATIONS, near_repeats


def test_rows_from_a_number_on_are_compared_with_those_before_it_alone() -> None:
    random = np.random.default_rng(0)
    first, second = random.integers(1, 1 << 32, (2, PERMUTATIONS), dtype=np.uint64)
    other = random.integers(1, 1 << 32, PERMUTATIONS, dtype=np.uint64)
    signatures = np.stack([first, first, second, first, other, other, second])
    found = list(near_repeats(signatures, set(), lambda one, two: 1.0, known=3))
    assert [(row, before) for row, before, _ in found] == [(3, 0), (6, 2)]
    assert [row for row, _, _ in near_repeats(signatures, {6}, lambda one, two: 1.0, known=3)] == [3]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("As an AI language model, I cannot have opinions.", True),
        ("I'm sorry, but as a large language model I do not know.", True),
        ("Als KI-Sprachmodell habe ich keine Meinung.", True),
        ("As an actor he was great.", False),
        ("A language model predicts words.", False),
    ],
)
def test_boilerplate_is_told_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, told: bool) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(json.dumps({"prompt": "Say: as an AI language model", "completion": answer}) + "\n")
    result = CliRunner().invoke(data_app, ["check", "a.jsonl", "--no-tokens", "--no-quality", "--json"])
    assert result.exit_code == 0
    assert [json.loads(line)["code"] for line in result.stdout.splitlines()] == (["data.boilerplate"] if told else [])
