"""`make bench-gpu` runs on a CPU with a toy shape, so that it is known to work before there is a GPU."""

import json
from pathlib import Path

import pytest
from benchmarks.gpu.__main__ import PARTS, Results, arguments, main, run_part


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_on_a_cpu_and_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str) -> None:
    status = main(["--device", "cpu", "--toy", "--part", part, "--out", str(tmp_path)])
    (written,) = tmp_path.iterdir()
    results = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == results
    assert status == 0 and {each["part"] for each in results} == {"machine", part}
    assert all("error" not in each and each.get("ok", True) for each in results), results


def test_a_part_that_takes_too_long_is_stopped_and_reported(tmp_path: Path) -> None:
    options, results = arguments(["--device", "cpu", "--toy"]), Results(tmp_path / "results.jsonl")
    assert not run_part("correct", options, results, seconds=0.2)
    assert "cut off" in json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])["error"]


def test_real_shapes_on_a_cpu_are_refused() -> None:
    with pytest.raises(SystemExit):
        arguments(["--device", "cpu"])
