"""`make bench-gpu` runs whole on a processor with a toy shape, so that it is ready when a GPU is there."""

import json
from pathlib import Path

import pytest
from benchmarks.gpu.__main__ import PARTS, Results, arguments, main, run_part


@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_on_a_processor_and_finds_nothing_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str) -> None:
    status = main(["--device", "cpu", "--toy", "--part", part, "--out", str(tmp_path)])
    (written,) = tmp_path.iterdir()
    found = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found
    assert status == 0 and {each["part"] for each in found} == {"machine", part}
    assert all("error" not in each and each.get("ok", True) for each in found), found


def test_a_part_that_takes_too_long_is_cut_off_and_told(tmp_path: Path) -> None:
    given, results = arguments(["--device", "cpu", "--toy"]), Results(tmp_path / "results.jsonl")
    assert not run_part("correct", given, results, seconds=0.2)
    assert "cut off" in json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])["error"]


def test_real_shapes_on_a_processor_are_refused() -> None:
    with pytest.raises(SystemExit):
        arguments(["--device", "cpu"])
