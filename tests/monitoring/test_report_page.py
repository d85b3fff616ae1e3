"""report.html: shows every figure of a run, asks for nothing, survives damaged files, and can be read in light, in dark and on a phone."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.written_runs import append_line, write_lines, write_run, write_status

from llamahome.monitoring.charts.curves import Chart, Curve, charts_of, log_ticks, ticks
from llamahome.monitoring.charts.page import page, write_report
from llamahome.monitoring.charts.png import write_pictures
from llamahome.monitoring.charts.svg import draw
from llamahome.monitoring.report import report_run
from llamahome.rundir import RunPaths

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(autouse=True)
def change_to_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def titles(text: str) -> list[str]:
    return re.findall(r"<h3>([^<]*)</h3>", text)


def points_of(figure: str) -> dict[str, list[list[Any]]]:
    """The points that a chart holds, by the name of their curve."""
    (data,) = re.findall(r'data-chart="([^"]*)"', figure)
    return {curve["name"]: curve["points"] for curve in json.loads(html.unescape(data))["curves"]}


def chart_named(title: str, paths: RunPaths) -> Chart:
    (chart,) = [chart for chart in charts_of(report_run(paths).records) if chart.title == title]
    return chart


def test_the_page_shows_charts_evaluations_samples_settings_data_and_environment() -> None:
    text = page(write_run())
    assert titles(text) == ["Loss", "Held-out answers", "Learning rate", "Gradient norm", "Speed", "Memory"]
    for shown in ("1.8000", "20 (best)", "Day 0.", "Day 40.", "Monday.", "training.batch_size", "96 rows, 8 held out", "8.0 GiB", "3.12.1"):
        assert shown in text, shown
    assert "best 1.8 at step 20" in text
    assert 'class="note' not in text, "nothing is wrong with this run"


def test_the_page_names_no_address_and_its_policy_forbids_requests() -> None:
    text = page(write_run())
    assert not re.search(r"(?i)(?:src|href|action)\s*=|url\(|@import|https?://(?!www\.w3\.org)", text)
    assert "default-src 'none'" in text


def test_text_of_rows_and_settings_is_shown_and_never_run() -> None:
    paths = write_run()
    evil = "</dd><script>alert(1)</script><img src=x onerror=alert(1)>"
    append_line(paths.metrics_dir / "samples.jsonl", {"step": 40, "prompt": evil, "answer": evil, "reference": evil})
    append_line(paths.metrics_dir / "events.jsonl", {"kind": "alert", "step": 3, "message": evil, "advice": evil})
    append_line(paths.metrics_dir / "metrics.jsonl", {"step": 40, "eval/<script>alert(1)</script>": 0.5})
    paths.environment.write_text(json.dumps({evil: evil}))
    text = page(paths)
    assert text.count("<script>") == 1 and "<img" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_alerts_are_shown_with_what_to_type() -> None:
    paths = write_run()
    append_line(
        paths.metrics_dir / "events.jsonl", {"event": "alert", "step": 7, "message": "the loss rose", "help": "llamahome data show x"}
    )
    text = page(paths)
    assert "step 7: the loss rose" in text and "llamahome data show x" in text


def test_rewards_have_a_chart_of_their_own() -> None:
    records = [{"step": step, "train/loss": 0.1 * (-1) ** step, "train/reward": step / 10} for step in range(1, 9)]
    loss, reward = charts_of(records)
    assert (reward.title, reward.curves[0].known[-1]) == ("Reward", (8, 0.8)) and not loss.log


def test_a_spike_of_one_step_among_ten_thousand_is_drawn() -> None:
    records = [{"step": step, "train/loss": 97.5 if step == 6_203 else 2.0 + step % 7 / 100} for step in range(1, 10_001)]
    (chart,) = charts_of(records)
    figure = draw(chart)
    drawn = points_of(figure)["training"]
    assert [6203, 97.5, "97.5"] in drawn
    assert len(drawn) < 1000
    assert chart.log and "logarithmic" in figure


def test_a_value_that_is_not_finite_interrupts_the_line() -> None:
    curve = Curve("training", [1, 2, 3, 4, 5], [1.0, 2.0, None, 2.0, 1.0])
    path = re.findall(r'class="line c0" d="([^"]*)"', draw(Chart("Loss", "nats", (curve,))))[0]
    assert path.count("M") == 2 and path.count("L") == 2


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 0.0, 0.0], [-1.0, 5.0], [1e-300, 1e300], [3.0, None]])
def test_any_few_values_can_be_drawn(values: list[float | None]) -> None:
    figure = draw(Chart("Loss", "nats", (Curve("training", [float(number) for number in range(len(values))], values),)))
    assert not re.search(r"\b(nan|inf)\b", figure.lower())


def test_a_metric_without_a_finite_value_gives_no_chart() -> None:
    assert charts_of([{"step": 1, "train/loss": float("nan")}, {"step": 2, "train/grad_norm": float("inf")}]) == []


@given(low=st.floats(-1e12, 1e12), span=st.floats(1e-6, 1e12))
def test_ticks_are_few_and_inside(low: float, span: float) -> None:
    high = low + span
    found = ticks(low, high)
    assert len(found) <= 12
    assert all(low - 1e-6 * abs(span) - 1e-9 * abs(low) <= tick <= high + 1e-6 * abs(span) + 1e-9 * abs(high) for tick in found)


@given(low=st.floats(1e-9, 1e9), factor=st.floats(1.2, 1e9))
def test_logarithmic_ticks_are_few_and_inside(low: float, factor: float) -> None:
    found = log_ticks(low, low * factor)
    assert 1 <= len(found) <= 8
    assert all(low <= tick <= low * factor * (1 + 1e-9) for tick in found)


@settings(deadline=None, max_examples=30)
@given(cut=st.integers(0, 9000))
def test_a_file_that_is_cut_anywhere_gives_a_page(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cut"))
        paths = write_run(steps=20)
        for name in ("metrics.jsonl", "events.jsonl", "samples.jsonl", "summary.json", "status.json"):
            file = paths.metrics_dir / name
            file.write_bytes(file.read_bytes()[:cut])
        assert "20260101-000000-amber-finch" in page(paths)


def test_missing_and_damaged_files_are_named_on_the_page() -> None:
    paths = write_run()
    file = paths.metrics_dir / "metrics.jsonl"
    file.write_bytes(b"\xff\xfe garbage\n[1]\n" + file.read_bytes() + b'{"t": 1, "step": 41, "train/lo')
    paths.config.write_text("training:\n  no_such_key: 1\n")
    (paths.metrics_dir / "summary.json").unlink()
    text = page(paths)
    assert "of a version that wrote no summary.json" in text
    assert "2 lines of metrics.jsonl cannot be read" in text and "config.yaml cannot be read" in text
    assert titles(text)[0] == "Loss"


def test_a_run_with_nothing_but_its_settings_has_a_page() -> None:
    paths = RunPaths(Path("output/runs/a"), "a")
    paths.root.mkdir(parents=True)
    paths.config.write_text("training:\n  seed: 1\n")
    text = page(paths)
    assert "metrics.jsonl is missing" in text and "No step has been recorded" in text and "training.seed" in text


@pytest.mark.parametrize(("state", "words"), [
    ("running", "still training"),
    ("stopped", "was stopped after step 40; to go on: <code>llamahome train-resume output/runs/20260101-000000-amber-finch</code>"),
    ("failed", "failed after step 40; to go on"),
])  # fmt: skip
def test_the_page_of_a_run_that_is_not_finished_says_how_it_stands(state: str, words: str) -> None:
    assert words in page(write_run(state=state))


def test_a_run_whose_process_is_gone_says_so() -> None:
    paths = write_run()
    write_status(paths, "running", 40, 80, t=1_790_000_080.0)
    assert "process of this run is gone; its last sign is of 2026-09-21" in page(paths)


def test_the_report_is_replaced_as_a_whole(tmp_path: Path) -> None:
    paths = write_run()
    first = write_report(paths)
    assert first == paths.report and first.read_text() == write_report(paths, tmp_path / "other.html").read_text()
    write_lines(paths.metrics_dir / "samples.jsonl", [])
    write_report(paths)
    assert "Day 40." not in paths.report.read_text()
    assert [path.name for path in paths.root.glob("*report*")] == ["report.html"]


def test_each_chart_is_a_picture_of_its_own() -> None:
    pytest.importorskip("matplotlib")
    paths = write_run(steps=200, losses={120: 60.0})
    written = write_pictures(charts_of(report_run(paths).records, best=(100, 1.8)), paths.report)
    assert [path.name for path in written][:2] == ["report-loss.png", "report-held-out-answers.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in written)


@pytest.mark.medium
@pytest.mark.skipif(not CHROMIUM.exists(), reason="no chromium here")
@pytest.mark.skipif("not __import__('importlib.util').util.find_spec('playwright')", reason="no playwright here")
def test_in_a_browser_the_page_asks_for_nothing_and_fits_a_phone_in_light_and_dark() -> None:
    from playwright.sync_api import sync_playwright

    target = write_report(write_run(steps=300, losses={200: 40.0, 250: None})).resolve()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        view = browser.new_context(offline=True).new_page()
        said: list[str] = []
        asked: list[str] = []
        view.on("console", lambda message: said.append(message.text))
        view.on("pageerror", lambda error: said.append(str(error)))
        view.on("request", lambda request: asked.append(request.url))
        view.goto(target.as_uri())
        colors = set()
        for width, scheme in ((390, "dark"), (1280, "light")):
            view.set_viewport_size({"width": width, "height": 900})
            view.emulate_media(color_scheme=scheme)
            assert view.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
            drawn = view.eval_on_selector_all("svg", "all => all.map(svg => [svg.clientWidth, svg.querySelectorAll('path.line').length])")
            assert len(drawn) == 6 and all(size > 200 and lines for size, lines in drawn)
            colors.add(view.evaluate("getComputedStyle(document.body).backgroundColor"))
        view.locator(".area").first.focus()
        for key in ("Home", "ArrowRight", "ArrowRight"):
            view.keyboard.press(key)
        assert "step 2\n" in view.locator(".tip").first.inner_text()
        browser.close()
    assert said == [] and asked == [target.as_uri()]
    assert len(colors) == 2


def test_the_page_is_written_without_torch() -> None:
    source = "import sys; import llamahome.monitoring.charts.page; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", source], check=True)
