"""A dashboard beside a training: what it shows, and that the training does not notice its end."""

import http.client
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from tests.support.dashboards import started
from tests.support.projects import Project, wait_until


@pytest.mark.medium
def test_a_training_goes_on_when_the_dashboard_that_follows_it_is_killed(project: Project) -> None:
    metrics = project.folder / "data/metrics/logs"

    def steps() -> int:
        return sum(path.read_text().count('"train/loss"') for path in metrics.glob("*/metrics.jsonl"))

    with started(project.folder) as server, ThreadPoolExecutor(1) as beside:
        training = beside.submit(project.type, "train", "chats.jsonl", "--epochs", "40")
        wait_until(lambda: steps() > 0)
        (run_id,) = project.runs()
        with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as connection:
            connection.request("GET", f"/api/run/{run_id}/live?cursor=0-0")
            stream = connection.getresponse()
            while not stream.readline().startswith(b"event: records"):
                pass
            server.end(signal.SIGKILL)
            assert not training.done()
        training.result().expect(0)
    assert sorted(project.run.by_step("train/loss")) == list(range(1, 201))


@pytest.mark.medium
def test_the_rows_of_a_real_run_are_those_that_data_show_prints(make_project: Callable[[Path], Project], tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    project.type("train", "chats.jsonl", "--set", "checkpoint.every=2 steps").expect(0)
    shown = project.type("data", "show", "chats.jsonl", "--row", "3", "--json", "--model", "tiny").expect(0).json
    with started(project.folder) as server:
        page = server.page(f"/run/{project.runs()[0]}/data?row=3")
        row = page.partition('<div class="tokens">')[2].partition("</div>")[0]
        assert row.count("<i>") == len(shown["tokens"])
        learned = sum(part.partition("</span>")[0].count("<i>") for part in row.split('<span class="learned">')[1:])
        assert learned == sum(token["target"] for token in shown["tokens"])
