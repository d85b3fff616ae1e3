"""The commands that run for the page of a new training: few at a time, none after the server, and none whose form has changed."""

import json
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tests.support.projects import wait_until

from llamahome.dashboard.commands import Form
from llamahome.dashboard.drafts import Draft, Drafts, newest, shortened
from llamahome.dashboard.jobs import Job, Jobs, TooManyJobs
from llamahome.monitoring.processes import identify, is_alive

LASTING = ("dashboard", "--port", "0")
"""A command that ends only when it is ended."""


@pytest.fixture
def running() -> Iterator[Jobs]:
    found = Jobs()
    yield found
    found.end_all()


def test_a_job_shows_what_it_has_printed_while_it_runs_and_ends_with_the_others(running: Jobs) -> None:
    job = running.begin(LASTING)
    process = identify(job._process.pid)
    wait_until(lambda: job.out.startswith("listening on http://127.0.0.1:"))
    assert job.status is None and job.shown == "llamahome dashboard --port 0"
    running.end_all()
    assert not is_alive(process) and job.out == ""


def test_no_more_jobs_than_a_few_run_at_once() -> None:
    few = Jobs(most=1)
    job = few.begin(LASTING)
    with pytest.raises(TooManyJobs):
        few.begin(LASTING)
    few.end(job)
    few.begin(("no-such-command",))
    few.end_all()


def test_an_error_is_shown_as_the_command_prints_it(running: Jobs) -> None:
    job = running.begin(("data", "chekc", "x"))
    wait_until(lambda: job.status is not None)
    assert job.status == 2 and job.err.startswith("error[usage.command-line]: ") and "help: " in job.err


def test_an_answer_holds_for_the_form_it_was_asked_for() -> None:
    form = Form("chats.jsonl", "tiny")
    job = Job(form.plan())
    try:
        draft = Draft("x", form, {"plan": job})
        assert draft.current("plan") is job and draft.current("check") is None
        draft.form = replace(form, epochs="2")
        assert draft.current("plan") is None and not draft.is_planned
    finally:
        job.end()


def test_a_draft_is_kept_until_a_training_was_started_from_it_or_twenty_came_after_it(tmp_path: Path) -> None:
    drafts, form = Drafts(tmp_path), Form("a.jsonl")
    first = drafts.save("", form)
    assert drafts.save(first.name, replace(form, data="b.jsonl")) is first and drafts.find(first.name).form.data == "b.jsonl"
    first.started = "20261129-114732-692279"
    assert drafts.save(first.name, form) is not first
    for _ in range(20):
        drafts.save("", form)
    assert drafts.find(first.name) is None and len([*tmp_path.iterdir()]) == 20


def test_another_server_finds_the_form_without_its_answers_and_shows_it_to_nobody_else(tmp_path: Path) -> None:
    form = Form("a.jsonl", "tiny", settings="monitoring.notify=curl -H token\nlora.rank=4")
    folder = tmp_path / "drafts"
    name = Drafts(folder).save("", form).name
    (path,) = folder.iterdir()
    assert (stat.S_IMODE(folder.stat().st_mode), stat.S_IMODE(path.stat().st_mode)) == (0o700, 0o600)
    later = Drafts(folder)
    draft = later.find(name)
    assert draft.form == form and draft.jobs == {} and not draft.is_planned and later.find(name) is draft
    assert later.save(name, replace(form, epochs="2")) is draft and Drafts(folder).find(name).form.epochs == "2"
    later.note_start(draft, "20261129-114732-692279")
    assert [*folder.iterdir()] == [] and Drafts(folder).find(name) is None and later.find(name).started is not None


@pytest.mark.parametrize("content", ["", "[]", '{"data": "x"}', json.dumps({**asdict(Form()), "data": 3}), "x" * 100_000])
def test_a_damaged_file_of_a_draft_is_no_draft(tmp_path: Path, content: str) -> None:
    (tmp_path / "abcdefghijkl.json").write_text(content)
    assert Drafts(tmp_path).find("abcdefghijkl") is None


def test_no_file_outside_the_folder_is_read_and_an_old_draft_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "drafts"
    drafts = Drafts(folder)
    name = drafts.save("", Form("a.jsonl")).name
    (tmp_path / "elsewhere.json").write_text(json.dumps(asdict(Form("b.jsonl"))))
    assert drafts.find("../elsewhere") is None and drafts.find("") is None and drafts.find("/etc/passwd") is None
    month_ago = time.time() - 31 * 24 * 3600
    os.utime(folder / f"{name}.json", (month_ago, month_ago))
    assert Drafts(folder).find(name) is None
    drafts.save("", Form("c.jsonl"))
    assert len([*folder.iterdir()]) == 1


def test_a_folder_that_cannot_be_written_costs_only_the_memory_of_the_next_server(tmp_path: Path) -> None:
    (tmp_path / "drafts").write_text("a file")
    drafts = Drafts(tmp_path / "drafts")
    assert drafts.find(drafts.save("", Form("a.jsonl")).name).form.data == "a.jsonl"


def test_of_a_long_text_the_lines_that_matter_are_shown() -> None:
    text = "\n".join(map(str, range(1000)))
    assert shortened(text).startswith("0\n1\n") and shortened(text).endswith("399\n... and 600 more lines") and shortened("a") == "a"
    assert newest(text).startswith("600\n") and newest(text).endswith("\n999")
