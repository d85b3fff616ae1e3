import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from benchmarks.pages import PAGES, block, fill_page, paths_of
from benchmarks.pictures import cost_lines, draw, part_shares, speed_bars
from benchmarks.results import files, gathered, merge, store
from benchmarks.start import checkpoint_cost, parts
from benchmarks.table import page
from tests.benchmarks.results_example import results

ROOT = Path(__file__).parents[2]


def test_the_pages_show_the_newest_results() -> None:
    paths = paths_of(ROOT / "benchmarks/results")
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "<!-- bench:" in text
        assert fill_page(text, paths) == text, "python -m benchmarks.pages fills them"


def test_a_page_only_changes_between_its_marks_and_only_once(tmp_path: Path) -> None:
    paths = {"native": [tmp_path / "2026-11-22-2cores.json"], "avx2": [tmp_path / "2026-11-23-2cores-avx2.json"]}
    store(tmp_path / "2026-11-22-2cores.json", results())
    store(tmp_path / "2026-11-23-2cores-avx2.json", {**results(), "level": "avx2"})
    assert paths_of(tmp_path) == {**paths, "avx512": []}
    text = "before\n<!-- bench:ratios -->\nold\n<!-- /bench -->\nafter\n<!-- bench:quality -->\n<!-- /bench -->\n"
    once = fill_page(text, paths)
    assert once.startswith("before\n<!-- bench:ratios -->\n") and "\nafter\n" in once
    assert "old" not in once
    assert "| LoRA, docstrings | TRL, micro-batch 1 | 4.0x | 0.25x | 2026-11-22 |" in once
    assert "| LoRA, docstrings | TRL with its default batching | 10.0x | 0.10x | 2026-11-22 |" in once
    assert fill_page(once, paths) == once
    assert "make bench" in fill_page(text, {"native": []})
    assert "held to avx2" in fill_page("<!-- bench:ratios-avx2 -->\n<!-- /bench -->\n", paths)


def test_every_block_of_the_pages_can_be_written(tmp_path: Path) -> None:
    names = {
        name for page in PAGES for name in re.findall(r"<!-- bench:([a-z]+)(?:-avx\\d+)? -->", (ROOT / page).read_text(encoding="utf-8"))
    }
    assert names
    for name in names:
        assert block(name, results(), [tmp_path / "2026-11-22-2cores.json"]).endswith("\n")


def test_the_page_of_the_results_shows_failures_too() -> None:
    text = page(results())
    for expected in (
        "cannot be installed: no network",
        "ended: no memory",
        "+0.08%",
        "0.003% of training",
        "takes +10%",
        "ours 5,600",
        "5.0 (4.9 to 5.1) s",
    ):
        assert expected in text


def test_a_repeated_part_replaces_only_its_earlier_result(tmp_path: Path) -> None:
    path = tmp_path / "2026-11-22-2cores.json"
    store(path, results())
    again = {"speed": {"docstrings-lora": {"title": "new"}}, "commands": ["make bench", "make bench ARGS=x"]}
    content = store(path, again)
    assert content == json.loads(path.read_text()) == merge(results(), again)
    assert content["speed"]["docstrings-lora"] == {"title": "new"}
    assert content["speed"]["rows-256-lora"] == json.loads(json.dumps(results()["speed"]["rows-256-lora"]))
    assert content["commands"] == ["make bench", "make bench ARGS=x"]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_results_are_not_those_of_a_smoke_run_and_the_newest_is_last(tmp_path: Path) -> None:
    assert files(tmp_path) == []
    for name in ("2026-11-21-2cores.json", "2026-11-22-2cores.json", "2026-11-23-2cores-quick.json", "data.md"):
        (tmp_path / name).touch()
    assert [each.name for each in files(tmp_path)] == ["2026-11-21-2cores.json", "2026-11-22-2cores.json"]


def test_of_each_scenario_the_newest_result_is_shown_with_its_date(tmp_path: Path) -> None:
    paths = [tmp_path / f"2026-11-{day}-2cores.json" for day in (22, 23)]
    store(paths[0], results())
    again = results()
    store(paths[1], {**again, "date": "2026-11-23", "speed": {"docstrings-lora": again["speed"]["docstrings-lora"]}, "length": {}})
    together = gathered(paths)
    assert together["speed"]["docstrings-lora"]["date"] == "2026-11-23" and together["speed"]["rows-256-lora"]["date"] == "2026-11-22"
    (tmp_path / "2026-11-22-2cores-speed.png").touch()
    filled = fill_page(
        "".join(f"<!-- bench:{name} -->\n<!-- /bench -->\n" for name in ("machine", "pictures", "speeds")), {"native": paths}
    )
    assert filled.count("\n- 2026-11-2") == 2 and "2026-11-22-2cores-speed.png" in filled
    assert "; 2026-11-22.\n" in filled and "; 2026-11-23.\n" in filled


def test_the_cost_of_a_checkpoint_is_relative_to_a_step_and_to_the_default_interval() -> None:
    step = {"time/data": 0.5, "time/forward": 1.0, "time/backward": 2.0, "time/update": 0.5, "train/loss": 2.0}
    longer = {**step, "time/backward": 2.2}
    steps = [
        step,
        step,
        {**longer, "time/save": 0.08},
        {**step, "time/save": 0.001},
        {**longer, "time/save": 0.039, "time/evaluate": 9.0},
        step,
    ]
    counted = [{**each, "step": number, "train/tokens": 100 * number} for number, each in enumerate(steps, start=1)]
    records = [{"step": 0, "eval/loss": 2.0}, *counted]
    expected = {"seconds": 0.06, "saves": 2, "step": 4.0, "of_a_step": 0.015, "of_training": 0.0001, "beside": 0.05}
    assert checkpoint_cost(records, every=2) == pytest.approx(expected)
    assert parts(records) == {"data": 0.5, "forward": 1.0, "backward": 2.1, "exchange": 0.0, "update": 0.5}
    assert "error" in checkpoint_cost(records[:3], every=2)
    assert parts([]) == {}


def test_charts_show_the_results() -> None:
    found = results()
    title, bars = speed_bars(found)[0]
    assert title == "LoRA, docstrings"
    assert [name for name, _, _ in bars] == ["llamahome", "plain PyTorch loop", "TRL, micro-batch 1", "TRL, default"]
    assert cost_lines({**found, "length": {}}) == {}, "two lengths of the speed part are no curve"
    assert [length for length, _ in cost_lines(found)["llamahome"]] == [64, 256, 1024]
    assert list(part_shares(found)) == ["data", "forward", "backward", "update"]
    assert part_shares({"speed": {}, "length": {}}) == {}


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="the extra `plots` is not installed")
def test_charts_are_written_to_the_folder_of_the_results(tmp_path: Path) -> None:
    written = draw(results(), tmp_path / "2026-11-22-2cores")
    assert sorted(path.name for path in written) == sorted(path.name for path in tmp_path.iterdir())
    assert [path.name for path in written][::2] == [f"2026-11-22-2cores-{name}.png" for name in ("speed", "parts", "length")]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written[::2])
    assert draw({"speed": {}, "length": {}}, tmp_path / "empty") == []
