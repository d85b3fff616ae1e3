"""The commands that run for the page of a new training: few at a time, none after the server, and none whose form has changed."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from tests.support.projects import wait_until

from llamahome.dashboard import jobs
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


def test_no_more_jobs_than_a_few_run_at_once(running: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_MOST_RUNNING", 1)
    job = running.begin(LASTING)
    with pytest.raises(TooManyJobs):
        running.begin(LASTING)
    running.end(job)
    running.begin(("no-such-command",))


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


def test_a_draft_is_kept_until_a_training_was_started_from_it_or_twenty_came_after_it() -> None:
    drafts, form = Drafts(), Form("a.jsonl")
    first = drafts.save("", form)
    assert drafts.save(first.name, replace(form, data="b.jsonl")) is first and drafts.find(first.name).form.data == "b.jsonl"
    first.started = "20261129-114732-692279"
    assert drafts.save(first.name, form) is not first
    for _ in range(20):
        drafts.save("", form)
    assert drafts.find(first.name) is None


def test_of_a_long_text_the_lines_that_matter_are_shown() -> None:
    text = "\n".join(map(str, range(1000)))
    assert shortened(text).startswith("0\n1\n") and shortened(text).endswith("399\n... and 600 more lines") and shortened("a") == "a"
    assert newest(text).startswith("600\n") and newest(text).endswith("\n999")
