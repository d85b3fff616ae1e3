"""A training from the page, as a person does it in a browser: from the upload to the finished run."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.browsers import opened, submit, visiting
from tests.support.dashboards import Dashboard, started
from tests.support.projects import Project, chats, wait_until, write_rows

from llamahome.dashboard.drafts import shown_plan, shown_rows
from llamahome.dashboard.library import Library
from llamahome.dashboard.started import StartedTrainings

TOKEN = "a-token-of-some-length"
SECONDS = 180_000


def commands(page: Any) -> list[str]:
    return page.locator(".command").all_inner_texts()


def status(project: Project, run_id: str) -> dict[str, Any]:
    return json.loads((project.folder / "data/metrics/logs" / run_id / "status.json").read_text())


def _started(project: Project) -> Dashboard:
    return started(project.folder, "--allow-start", "--token", TOKEN)


def test_what_the_commands_print_for_programs_is_what_the_page_reads(project: Project) -> None:
    rows = shown_rows(project.type("data", "show", "chats.jsonl", "--rows", "2", "--json").expect(0).out)
    assert [row["number"] for row in rows] == [0, 1] and all(0 < row["learned"] < row["tokens"] for row in rows)
    assert ["".join(texts) for kind, texts in rows[0]["spans"] if kind == "learned"] == [f"{answer_of(project, 0)}<|im_end|>"]
    plan = shown_plan(project.type("plan", "chats.jsonl", "--max-steps", "3", "--json").expect(0).out)
    assert plan["fits"] and {"Time", "Memory", "Steps", "Disk"} <= {label for label, _, _ in plan["figures"]}
    assert ("Steps", "3", "0.6 epochs of 20 rows") in plan["figures"] and {"weights", "activations"} <= {name for name, _ in plan["parts"]}
    assert shown_plan("") is None and shown_plan("not JSON\n") is None and shown_rows('{"tokens": [{"id": 1,') == []


def answer_of(project: Project, row: int) -> str:
    return json.loads((project.folder / "chats.jsonl").read_text().splitlines()[row])["messages"][1]["content"]


@pytest.mark.slow
def test_a_training_is_uploaded_checked_planned_started_stopped_resumed_and_outlives_the_server(
    make_project: Callable[[Path], Project], tmp_path: Path
) -> None:
    project = make_project(tmp_path / "project")
    mine = write_rows(tmp_path / "my rows.jsonl", chats(200))
    with _started(project) as server, opened() as browser, visiting(browser, f"{server.url}/?token={TOKEN}") as visit:
        page = visit.page
        page.click("nav >> text=Start")
        page.wait_for_selector("#file", state="visible")  # the script that takes the file has begun
        page.set_input_files("#file", str(mine))
        page.wait_for_function("() => document.getElementById('data').value === 'data/training/uploads/my-rows.jsonl'")
        page.fill("#max_steps", "600")
        page.fill("#settings", "training.batchsize=4\nmonitoring.tensorboard=false")
        submit(page, "Check the data", SECONDS)
        wrong = page.locator("#results").inner_text()
        assert "error[config.unknown-key]" in wrong and "training.batch_size" in wrong and "exit status 2" in wrong
        page.fill("#settings", "monitoring.tensorboard=false")
        submit(page, "Check the data", SECONDS)
        assert "200 rows in 1 file" in page.locator("#results").inner_text()
        assert page.locator(".tokens .learned").count() == 3 and page.locator("text=Start this training").count() == 0
        submit(page, "Show the plan", SECONDS)
        plan = page.locator("[aria-labelledby=plan-title]").inner_text()
        assert re.search(r"Steps\s+600\s", plan) and "MiB" in plan
        words = "data/training/uploads/my-rows.jsonl --model tiny --method lora --max-steps 600 --set monitoring.tensorboard=false"
        assert {f"llamahome plan {words}", f"llamahome train {words}"} <= set(commands(page))
        page.click("text=Start this training")
        page.wait_for_url("**/run/**", timeout=SECONDS)
        run_id = page.url.rsplit("/", 1)[1]
        page.click("text=Stop with a checkpoint")
        page.wait_for_selector("button:has-text('Resume')", timeout=SECONDS)
        assert status(project, run_id)["state"] == "stopped" and page.locator("#models tbody tr").count() > 0
        page.click("button:has-text('Resume')")
        page.wait_for_url("**/started/**", timeout=SECONDS)
        page.wait_for_url("**/run/**", timeout=SECONDS)
        assert (visit.errors, visit.hosts) == ([], {f"127.0.0.1:{server.port}"})
        resumed = status(project, run_id)
        server.end(signal.SIGKILL)
    wait_until(lambda: status(project, run_id)["state"] == "finished", seconds=180)
    assert resumed["step"] < 600 and status(project, run_id)["step"] == 600 and status(project, run_id)["pid"] == resumed["pid"]
    with _started(project) as later:
        shown = later.get(f"/run/{run_id}", Authorization=f"Bearer {TOKEN}")[2]
        assert f"llamahome train-resume output/runs/{run_id}" in shown and "<form method" not in shown


@pytest.mark.slow
def test_a_training_of_two_processes_is_found_by_its_first_one_and_stopped_by_its_launcher(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    trainings, library = StartedTrainings(), Library()
    record = trainings.start(["train", "chats.jsonl", "--max-steps", "5000", "--set", "distributed.world_size=2"])
    try:
        wait_until(lambda: trainings.with_run(record, list(library.runs().values())).run is not None, seconds=180)
        paths = library.find(trainings.find(record.name).run)
        wait_until(lambda: status(project, paths.run_id)["step"] > 0, seconds=60)
        assert status(project, paths.run_id)["pid"] != record.process.pid
        trainings.stop(record.name, paths)
        wait_until(lambda: trainings.status(record.name) is not None, seconds=60)
        assert trainings.status(record.name) == 75 and status(project, paths.run_id)["state"] == "stopped" and paths.checkpoints()
    finally:
        if trainings.status(record.name) is None:
            os.killpg(record.process.pid, signal.SIGKILL)
