"""What a run leaves for those who look at it: its report and its profile, also when it fails, and the commands that read them."""

import gzip
import json
import re

import pytest
from tests.support.projects import Project


@pytest.fixture(scope="module")
def watched(make_project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project after a run of five steps of which two were profiled; what it printed is in the file `stdout`."""
    project = make_project(tmp_path_factory.mktemp("watched") / "project")
    words = ("--set", "monitoring.profile=steps 2-3", "--set", "output.name=otter", "--set", "evaluation.sample_prompts=1")
    (project.folder / "stdout").write_text(project.type("train", "chats.jsonl", *words).expect(0).out)
    return project


@pytest.mark.medium
def test_the_end_of_a_run_names_its_report_and_its_profile(watched: Project) -> None:
    named = dict(re.findall(r"^(profile|report) +(\S+)$", (watched.folder / "stdout").read_text(), flags=re.MULTILINE))
    page = (watched.folder / named["report"]).read_text()
    assert "<h3>Loss</h3>" in page and ">finished</span>" in page and "24 rows" not in page
    assert "20 rows, 4 held out" in page and "<h2>Samples</h2>" in page
    folder = watched.folder / named["profile"]
    assert {path.name for path in folder.iterdir()} == {"trace-steps-2-3.json.gz", "table-steps-2-3.txt"}
    with gzip.open(folder / "trace-steps-2-3.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"step 2", "step 3", "part: forward", "layer: attention"} <= names and "step 4" not in names
    assert (folder / "table-steps-2-3.txt").read_text().startswith("steps 2 to 3: ")


def test_a_run_is_watched_compared_and_reported_after_its_end(watched: Project) -> None:
    tail = watched.type("runs", "tail", "otter").expect(0).out
    assert "batch: 4 rows" in tail and "step=5/5" in tail and "otter finished at" in tail
    compared = watched.type("runs", "compare", "otter", "latest", "--json").expect(0).json
    assert compared["settings"] == {} and compared["runs"][0]["steps"] == 5
    written = watched.type("runs", "report", "otter", "--output", "otter.html", "--json").expect(0).json
    assert written == {"report": "otter.html", "pictures": []} and (watched.folder / "otter.html").is_file()


def test_a_report_in_a_missing_folder_is_refused(watched: Project) -> None:
    answer = watched.type("runs", "report", "otter", "--output", "nowhere/at/all.html").expect(4)
    assert answer.codes == ["machine.cannot-write"]


def test_a_profile_that_the_run_never_reaches_is_said_before_and_after(project: Project) -> None:
    answer = project.type("train", "chats.jsonl", "--max-steps", "2", "--set", "monitoring.profile=steps 7-9").expect(0)
    assert "monitoring.profile steps 7-9 has no effect: training.max_steps ends the run after step 2" in answer.err
    assert "the run did none of the steps 7 to 9" in answer.err


@pytest.mark.parametrize("text", ["20-25", "steps 9-2", "steps 1-99"])
def test_a_profile_of_no_steps_is_refused(project: Project, text: str) -> None:
    answer = project.type("train", "chats.jsonl", "--set", f"monitoring.profile={text}").expect(2)
    assert len(answer.codes) == 1 and "steps" in answer.err


def test_a_run_that_fails_has_a_report_too(project: Project) -> None:
    words = ("--set", "training.learning_rate=1e30", "--set", "training.max_bad_steps=1", "--set", "training.max_grad_norm=null")
    project.type("train", "chats.jsonl", *words).expect(6)
    page = (project.run.root / "report.html").read_text()
    assert ">failed</span>" in page and "The run failed after step" in page
