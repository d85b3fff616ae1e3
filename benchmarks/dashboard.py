"""Measures the dashboard in a browser: prints one JSON object.

    PYTHONPATH=. python benchmarks/dashboard.py [--rounds 3] [--steps 200000]

Every round starts a server of its own, so nothing has been read before. Times are the browser's, from the navigation on: the list of 50
runs of 5,000 steps each; a run of 200,000 steps until its loss is drawn, and until every chart is; a page that is open while a run writes
about ten steps a second: bytes a second, and the longest time from a line in the file to its point in the chart. On a busy machine the
processor time of the server (`*_server_cpu_s`) says more. Needs playwright and chromium (requirements-browser.lock); medians.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from tests.support.browsers import opened, visiting
from tests.support.dashboards import Dashboard, append, records, started, write_run

_DRAWN = "(name) => document.getElementById(`chart-${name}`).uplot?.data[0].length > 100"
_ALL = "() => [...document.querySelectorAll('.chart')].every((figure) => figure.uplot || !figure.querySelector('.nothing').hidden)"
_COMPLETE = "() => document.getElementById('reading').hidden && document.getElementById('figure-speed').textContent !== '–'"
_SIZE = """() => ['navigation', 'resource'].flatMap((kind) => performance.getEntriesByType(kind))
  .reduce((sum, each) => sum + each.transferSize, 0)"""
_NOW = "() => performance.now() / 1000"
_SECONDS_OPEN, _RATE = 20, 20


def _processor_seconds(server: Dashboard) -> float:
    times = psutil.Process(server.process.pid).cpu_times()
    return times.user + times.system


def listing(browser: Any, home: Path) -> dict[str, float]:
    """Seconds until the list of all runs is there, and bytes of that page."""
    with started(home) as server, visiting(browser, "about:blank") as visit:
        begin = _processor_seconds(server)
        visit.page.goto(f"{server.url}/")
        visit.page.wait_for_selector("tr[data-run]")
        found = {"list_s": visit.page.evaluate(_NOW), "list_bytes": visit.page.evaluate(_SIZE)}
        return found | {"list_server_cpu_s": _processor_seconds(server) - begin}


def long_run(browser: Any, home: Path, run_id: str) -> dict[str, float]:
    """Seconds until the loss of a long run is drawn, and until all charts are."""
    with started(home) as server, visiting(browser, "about:blank") as visit:
        begin = _processor_seconds(server)
        visit.page.goto(f"{server.url}/run/{run_id}")
        visit.page.wait_for_function(_DRAWN, arg="loss", timeout=60_000)
        loss = visit.page.evaluate(_NOW)
        visit.page.wait_for_function(_ALL, timeout=120_000)
        visit.page.wait_for_function(_COMPLETE, timeout=120_000)
        found = {"loss_s": loss, "all_s": visit.page.evaluate(_NOW), "run_bytes": visit.page.evaluate(_SIZE)}
        return found | {"all_server_cpu_s": _processor_seconds(server) - begin}


def live(browser: Any, home: Path, run_id: str) -> dict[str, float]:
    """Bytes a second of an open page, and seconds from a line to its point."""
    metrics = write_run(home, run_id, steps=1000, state="running") / "metrics.jsonl"
    with started(home) as server, visiting(browser, f"{server.url}/run/{run_id}") as visit:
        visit.page.wait_for_function("() => document.getElementById('figure-left').textContent !== '–'", timeout=20_000)
        client = visit.page.context.new_cdp_session(visit.page)
        received: list[int] = []
        client.on("Network.dataReceived", lambda event: received.append(event["encodedDataLength"] or event["dataLength"]))
        client.send("Network.enable")
        step, delays = 1000, []
        begin = time.monotonic()
        while time.monotonic() - begin < _SECONDS_OPEN:
            append(metrics, records(_RATE // 4, first=step + 1))
            step, written = step + _RATE // 4, time.monotonic()
            visit.page.wait_for_function(f"() => document.getElementById('chart-loss').uplot.data[0].at(-1) === {step}", timeout=20_000)
            delays.append(time.monotonic() - written)
            visit.page.wait_for_timeout(max(0, 250 - 1000 * delays[-1]))
        return {
            "bytes_per_s": sum(received) / (time.monotonic() - begin),
            "steps_per_s": (step - 1000) / _SECONDS_OPEN,
            "point_s": max(delays),
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, opened() as browser:
        many, one = Path(folder) / "many", Path(folder) / "one"
        for number in range(50):
            write_run(many, f"20261122-{number:06d}-run", steps=5000)
        write_run(one, "20261122-000000-long", steps=arguments.steps)
        rounds = []
        for number in range(arguments.rounds):
            found = {**listing(browser, many), **long_run(browser, one, "20261122-000000-long")}
            rounds.append(found | live(browser, Path(folder) / f"live-{number}", "20261122-000000-live"))
    print(json.dumps({name: round(statistics.median(each[name] for each in rounds), 3) for name in rounds[0]}, indent=2))


if __name__ == "__main__":
    main()
