"""A trace of a run, opened with Perfetto: its trace processor reads every event, and its interface shows the trace."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.browsers import opened, visiting
from tests.support.models import save_tiny
from tests.support.perfetto import TraceProcessor, served
from tests.support.runs import make_learner
from tests.training.test_profiled_run import profiled

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("perfetto")
    profiled(make_learner(save_tiny(folder / "llama", "llama"), "lora"), folder, 3, 4)
    return folder / "profile/trace-steps-3-4.json.gz"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with opened() as browser:
        yield browser


def test_the_trace_processor_reads_every_event_and_finds_parts_and_layers_in_their_steps(browser: Any, trace: Path) -> None:
    with gzip.open(trace) as file:
        written = [event for event in json.load(file)["traceEvents"] if event["ph"] in ("X", "i")]
    with served(trace) as address, visiting(browser, f"{address}v52.0-6b9586def/manifest.json") as visit:
        perfetto = TraceProcessor(visit.page, trace)
        assert perfetto.query("select name, value from stats where severity in ('error', 'data_loss') and value > 0") == []
        (counted,) = perfetto.query("select count(*) as slices, count(iif(dur < 0, 1, null)) as unfinished from slice")
        assert counted == {"slices": len(written), "unfinished": 0}
        steps = perfetto.query("select name, dur from slice where name glob 'step *' order by ts")
        durations = {event["name"]: event["dur"] for event in written if event["ph"] == "X"}
        assert [step["name"] for step in steps][:2] == ["step 3", "step 4"]
        assert steps[0]["dur"] == pytest.approx(1000 * durations["step 3"], rel=0.01)
        inside = """
            select distinct above.name as step, slice.name as name from slice, ancestor_slice(slice.id) above
            where above.name glob 'step *' and (slice.name glob 'part: *' or slice.name glob 'layer: *')"""
        found = {(row["step"], row["name"]) for row in perfetto.query(inside)}
        for name in ("part: forward", "part: backward", "part: update", "layer: attention", "layer: MLP"):
            assert {("step 3", name), ("step 4", name)} <= found


def test_the_interface_opens_the_trace(browser: Any, trace: Path) -> None:
    with served(trace) as address, visiting(browser, address) as visit:
        visit.page.get_by_text(re.compile(r"^python \d+$")).first.wait_for(timeout=60_000)  # the track of the process
        assert visit.page.locator("[class*=modal]").count() == 0, "it says what is wrong with a trace"
