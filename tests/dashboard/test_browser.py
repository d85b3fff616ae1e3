"""The pages in a browser: every chart has its points, they grow while a run trains, and nothing that ends breaks a page."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.browsers import Visit, axe, opened, visiting
from tests.support.dashboards import (
    CONFIG,
    PLANNED_MEMORY,
    RUN_ID,
    Dashboard,
    append,
    lines,
    records,
    started,
    write_data,
    write_run,
    write_status,
)

LIVE = "20261122-100000-live"
OTHER = "20261122-090000-other"
PAGES = (
    "/",
    f"/run/{RUN_ID}",
    f"/run/{RUN_ID}/samples",
    f"/run/{RUN_ID}/data",
    f"/run/{RUN_ID}/system",
    f"/compare?run={RUN_ID}&run={OTHER}",
)
DRAWN = """() => [...document.querySelectorAll('.chart')].every((figure) => figure.uplot || !figure.querySelector('.nothing').hidden)"""
POINTS = """(name) => {
  const figure = document.getElementById(`chart-${name}`);
  return figure?.uplot ? figure.uplot.data.map((values) => values.filter((value) => value !== null && value !== undefined)) : [];
}"""
LAST_X = "(name) => document.getElementById(`chart-${name}`).uplot.data[0].at(-1)"
MANY_ROWS = {"rows": [f"chats.jsonl:{line}" for line in range(1, 13)], "show": "llamahome data show chats.jsonl --row 0-11"}
INK = """(name) => {
  const canvas = document.querySelector(`#chart-${name} canvas`);
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const colours = new Set();
  for (let at = 0; at < pixels.length; at += 4) if (pixels[at + 3] > 200) colours.add(pixels.slice(at, at + 3).join());
  return colours.size;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with opened() as browser:
        yield browser


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("browser")
    metrics = write_run(home)
    events = [
        {"t": 1.0, "kind": "saved", "step": 20, "folder": "checkpoint-20"},
        {"kind": "alert", "alert": "spike", "step": 7, "text": "a spike"},
    ]
    (metrics / "events.jsonl").write_text(lines([*events, {"t": 2.0, "kind": "bad-step", "step": 9, "rows": ["chats.jsonl:3"]}]))
    answers = [{"step": step, "prompt": "What?", "answer": f"answer {step}", "reference": "right"} for step in (0, 10)]
    (metrics / "samples.jsonl").write_text(lines(answers))
    write_data(home, RUN_ID)
    write_run(home, OTHER, steps=25, config=CONFIG.replace("0.001", "0.002"))
    return home


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Dashboard]:
    with started(home) as server:
        yield server


def points(visit: Visit, name: str) -> list[list[float]]:
    return visit.page.evaluate(POINTS, name)


def wait_for_points(visit: Visit, name: str, count: int, *, series: int = 1) -> None:
    visit.page.wait_for_function(f"() => ({POINTS})({json.dumps(name)})[{series}]?.length === {count}", timeout=20000)


def wait_for_a_stream(visit: Visit) -> None:
    """Until the page follows the run, so that what is written now is new to it."""
    visit.page.wait_for_function("() => document.getElementById('figure-left')?.textContent !== '–'", timeout=20000)


@pytest.mark.medium
def test_every_chart_has_the_points_of_its_metrics_and_asks_nobody_else(browser: Any, server: Dashboard) -> None:
    expected = {"loss": [44, 40, 5], "learning-rate": [40, 40, 40], "gradient-norm": [40, 40], "speed": [40, 40, 40]}
    expected |= {"step-time": [40] * 6, "step-shares": [40] * 6, "memory": [40, 40, 40, 2], "scores": [5, 5], "use": [19, 19, 19]}
    with visiting(browser, f"{server.url}/run/{RUN_ID}") as visit:
        visit.page.wait_for_function(DRAWN)
        assert {name: list(map(len, points(visit, name))) for name in expected} == {**expected, "loss": [41, 40, 5]}
        assert all(visit.page.evaluate(INK, name) > 3 for name in expected), "a canvas is blank"
        losses = [record["train/loss"] for record in records(40) if "train/loss" in record]
        assert points(visit, "loss")[1] == pytest.approx(losses, rel=1e-5)
        assert (visit.errors, visit.hosts) == ([], {f"127.0.0.1:{server.port}"})
    with visiting(browser, f"{server.url}/run/{RUN_ID}/system") as visit:
        visit.page.wait_for_function(DRAWN)
        assert list(map(len, points(visit, "use"))) == [20, 20, 20] and visit.page.evaluate(INK, "use") > 3
        assert visit.errors == []


@pytest.mark.medium
def test_the_losses_are_asked_for_once_by_the_head_of_the_page(browser: Any, server: Dashboard) -> None:
    with visiting(browser, "about:blank") as visit:
        asked: list[str] = []
        visit.page.on("request", lambda request: asked.append(request.url))
        visit.page.goto(f"{server.url}/run/{RUN_ID}")
        visit.page.wait_for_function(DRAWN)
        visit.page.wait_for_timeout(4000)  # after three seconds a browser warns of what was asked for and not used
        assert len([url for url in asked if "hurry=1" in url]) == 1 and len(points(visit, "loss")[1]) == 40
        visit.page.select_option("select[name=x]", "tokens")
        visit.page.wait_for_function(f"() => ({POINTS})('loss')[0].at(-1) === 4000")
        assert visit.errors == []


@pytest.mark.medium
def test_curves_lie_along_steps_tokens_or_time_smoothed_or_on_a_log_axis(browser: Any, server: Dashboard) -> None:
    with visiting(browser, f"{server.url}/run/{RUN_ID}") as visit:
        visit.page.wait_for_function(DRAWN)
        visit.page.select_option("select[name=x]", "tokens")
        visit.page.wait_for_function(f"() => ({POINTS})('loss')[0].at(-1) === 4000")
        visit.page.select_option("select[name=x]", "time")
        visit.page.wait_for_function(f"() => ({POINTS})('loss')[0].at(-1) === 40.5")
        visit.page.select_option("select[name=x]", "step")
        visit.page.locator("input[name=smooth]").fill("0.9")
        visit.page.wait_for_function("() => document.getElementById('chart-loss')?.uplot?.series.length === 5")
        raw, smooth = points(visit, "loss")[1:3]
        assert max(smooth[20:]) - min(smooth[20:]) < max(raw[20:]) - min(raw[20:])
        visit.page.locator("input[name=log]").check()
        distributions = "() => ['loss', 'speed'].map((name) => document.getElementById(`chart-${name}`).uplot.scales.y.distr)"
        assert visit.page.evaluate(distributions) == [3, 1] and visit.errors == []


@pytest.mark.medium
def test_every_chart_is_a_table_too_and_answers_to_the_keyboard(browser: Any, server: Dashboard) -> None:
    with visiting(browser, f"{server.url}/run/{RUN_ID}") as visit:
        visit.page.wait_for_function(DRAWN)
        for name, rows in (("loss", 41), ("step-time", 40)):
            visit.page.locator(f"#chart-{name} .table-button").press("Enter")
            assert visit.page.locator(f"#chart-{name} .values tbody tr").count() == rows
        assert visit.page.locator("#chart-step-time .values tbody tr").first.inner_text().split("\t")[1] == "0.1 s"
        visit.page.locator("#chart-loss .plot").press("Home")
        visit.page.locator("#chart-loss .plot").press("ArrowRight")
        visit.page.wait_for_function("() => document.querySelector('#chart-loss .legend').textContent.startsWith('step 1')")
        assert "41 points" not in visit.page.locator("#chart-loss .plot").get_attribute("aria-label")
        assert "45 points; last training" in visit.page.locator("#chart-loss .plot").get_attribute("aria-label")


@pytest.mark.medium
def test_the_parts_of_a_step_are_bands_that_fill_the_whole_also_where_steps_lack_a_part(
    browser: Any, server: Dashboard, home: Path
) -> None:
    run_id = "20261122-120000-profiled"
    metrics = write_run(home, run_id, steps=0)
    parts = [{"forward": 0.3, "backward": 0.1, "save": 0.4}, {"forward": 0.3, "backward": 0.1}, {"forward": 0.2, "profile": 0.6}]
    written = [{f"time/{part}": seconds for part, seconds in each.items()} for each in parts]
    (metrics / "metrics.jsonl").write_text(
        lines({"t": 1.0 + at, "step": at, "train/loss": 1.0} | each for at, each in enumerate(written, 1))
    )
    with visiting(browser, f"{server.url}/run/{run_id}") as visit:
        visit.page.wait_for_function(DRAWN)
        tops = points(visit, "step-shares")
        assert tops[0] == [1, 2, 3] and tops[1] == pytest.approx([1, 1, 1])  # the whole is drawn first
        assert tops[-1] == pytest.approx([0.375, 0.75, 0.25])  # forward lies at the bottom
        assert points(visit, "step-time")[1] == pytest.approx([0.8, 0.4, 0.8])
        visit.page.locator("#chart-step-shares .table-button").click()
        cells = [row.split("\t") for row in visit.page.locator("#chart-step-shares .values tbody tr").all_inner_texts()]
        assert cells == [["1", "37.5 %", "12.5 %", "50 %", ""], ["2", "75 %", "25 %", "", ""], ["3", "25 %", "", "", "75 %"]]
        assert visit.errors == []


@pytest.mark.medium
def test_the_planned_memory_is_drawn_beside_the_measured_one(browser: Any, server: Dashboard) -> None:
    with visiting(browser, f"{server.url}/run/{RUN_ID}") as visit:
        visit.page.wait_for_function(DRAWN)
        assert points(visit, "memory")[3] == [sum(PLANNED_MEMORY.values())] * 2
        assert visit.page.evaluate("() => document.getElementById('chart-memory').uplot.series[3].dash.length") == 2
        about = visit.page.locator("#chart-memory .about").inner_text()
        assert "Planned: weights 512.0 MiB, activations 256.0 MiB" in about and "Python and its libraries 512.0 MiB" in about


@pytest.mark.medium
def test_points_and_alerts_appear_while_the_run_trains_and_half_a_line_waits(browser: Any, server: Dashboard, home: Path) -> None:
    metrics = write_run(home, LIVE, state="running", config=CONFIG)
    with visiting(browser, f"{server.url}/run/{LIVE}") as visit:
        wait_for_points(visit, "loss", 40)
        wait_for_a_stream(visit)
        append(metrics / "metrics.jsonl", records(2, first=41))
        wait_for_points(visit, "loss", 42)
        assert len(points(visit, "step-time")[5]) == 42 and points(visit, "loss")[0][-1] == 42
        line = lines(records(1, first=43))
        with (metrics / "metrics.jsonl").open("a") as file:
            file.write(line[:50])
        append(
            metrics / "events.jsonl",
            [{"event": "alert", "alert": "data-wait", "step": 43, "text": "<b>slow</b>", "help": "llamahome doctor", **MANY_ROWS}],
        )
        visit.page.wait_for_function("() => document.querySelector('.alerts')?.textContent.includes('<b>slow</b>')", timeout=20000)
        told = visit.page.locator(".alerts li").first
        assert "chats.jsonl:8, and 4 more llamahome data show" in told.inner_text() and told.locator("a").count() == 8
        assert points(visit, "memory")[3][-1] == sum(PLANNED_MEMORY.values()) and visit.page.evaluate(LAST_X, "memory") == 42
        assert len(points(visit, "loss")[1]) == 42, "half a line is no record"
        with (metrics / "metrics.jsonl").open("a") as file:
            file.write(line[50:])
        wait_for_points(visit, "loss", 43)
        write_status(metrics, state="finished", step=43, horizon=50, reason="no gain")
        visit.page.wait_for_function("() => document.querySelector('#state').textContent === 'finished'", timeout=20000)
        assert visit.page.locator(".progress-line").inner_text().startswith("43 of 50 steps (no gain)")
        (metrics / "metrics.jsonl").write_text(lines(records(10)))
        wait_for_points(visit, "loss", 10)
        assert visit.errors == []


@pytest.mark.medium
def test_a_page_outlives_its_server_and_goes_on_with_the_next_one(browser: Any, home: Path) -> None:
    run_id = "20261122-110000-outlives"
    metrics = write_run(home, run_id, state="running")
    with started(home) as first, visiting(browser, f"{first.url}/run/{run_id}") as visit:
        wait_for_points(visit, "loss", 40)
        wait_for_a_stream(visit)
        first.end(signal.SIGKILL)
        visit.page.wait_for_selector("#reading:not([hidden])")
        append(metrics / "metrics.jsonl", records(3, first=41))
        assert len(points(visit, "loss")[1]) == 40
        with started(home, port=first.port):
            wait_for_points(visit, "loss", 43)


def test_ticked_runs_are_drawn_together(browser: Any, server: Dashboard) -> None:
    with visiting(browser, f"{server.url}/") as visit:
        assert visit.page.locator("#compare-button").is_disabled()
        visit.page.get_by_label(f"Compare {RUN_ID}").check()
        visit.page.get_by_label(f"Compare {OTHER}").check()
        visit.page.locator("#compare-button").click()
        wait_for_points(visit, "loss", 25, series=1)
        wait_for_points(visit, "loss", 40, series=2)
        visit.page.wait_for_function(DRAWN)
        assert list(map(len, points(visit, "eval-loss"))) == [5, 3, 5]
        assert "0.002" in visit.page.locator("#differ-title + div").inner_text() and visit.errors == []


def test_the_list_is_filtered_while_one_types(browser: Any, server: Dashboard) -> None:
    with visiting(browser, f"{server.url}/") as visit:
        visit.page.get_by_label("Name contains").press_sequentially("otter")
        assert visit.page.locator("tr[data-run]:visible").count() == 1
        visit.page.get_by_label("State").select_option("failed")
        assert visit.page.locator("tr[data-run]:visible").count() == 0 and visit.page.locator("#none").is_visible()


@pytest.mark.medium
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.split("?")[0].split("/")[-1] or "runs")
def test_a_page_is_accessible_fits_and_is_small(browser: Any, server: Dashboard, path: str) -> None:
    source = axe()
    with visiting(browser, server.url + path) as visit:
        visit.page.wait_for_function(DRAWN)
        sizes = "() => ['navigation', 'resource'].flatMap((kind) => performance.getEntriesByType(kind)).map((each) => each.transferSize)"
        assert sum(visit.page.evaluate(sizes)) < 150_000
        visit.page.evaluate(source)
        for scheme, width in (("light", 1280), ("dark", 1280), ("light", 390)):
            visit.page.emulate_media(color_scheme=scheme)
            visit.page.set_viewport_size({"width": width, "height": 844})
            found = visit.page.evaluate("() => axe.run(document, { resultTypes: ['violations'] })")["violations"]
            serious = [
                (each["id"], [node["html"] for node in each["nodes"]][:3]) for each in found if each["impact"] in ("serious", "critical")
            ]
            assert serious == [], (scheme, width)
            assert visit.page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), f"wider than {width}"
        assert visit.errors == []


def test_a_browser_without_the_token_is_asked_for_it(browser: Any, home: Path) -> None:
    with started(home, "--token", "a-token-of-some-length") as server, visiting(browser, f"{server.url}/") as visit:
        assert visit.page.locator("tr[data-run]").count() == 0
        for given, runs in (("wrong", False), ("a-token-of-some-length", True)):
            visit.page.get_by_label("The terminal that started").fill(given)
            with visit.page.expect_navigation():
                visit.page.get_by_role("button", name="Open").click()
            assert (visit.page.locator("tr[data-run]").count() > 0) == runs
        assert "token" not in visit.page.url
