"""The pages that start a training, show what it prints, stop it and resume it: `dashboard --allow-start`.

Every one of them needs the token. What changes something is a POST of a page of this server; gate.py lets no other one through.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qsl

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from llamahome.config.load import load_config
from llamahome.dashboard.commands import Form, RefusedForm, base_models, must_be_fetched, read_form
from llamahome.dashboard.drafts import Draft, Drafts, Kind, newest, shown_job, shown_plan, shown_rows
from llamahome.dashboard.jobs import Job, TooManyJobs, shown_command
from llamahome.dashboard.library import Library
from llamahome.dashboard.pages import Pages
from llamahome.dashboard.started import RefusedStart, StartedTrainings, writes
from llamahome.dashboard.uploads import MOST_BYTES, RefusedUpload, receive
from llamahome.errors import ConfigError
from llamahome.rundir import STARTER, RunPaths, nearby

_MOST_OF_A_FORM = 64 << 10
_SECONDS_FOR_A_FORM = 30
_RESUMABLE = ("stopped", "failed", "lost")
UPLOAD = "/start/upload"
_NO_DRAFT = "There is no such draft. Drafts are kept until a training is started from them, for a month, and twenty at most."
Action = Callable[[Request, dict[str, str]], Response]


def most_bytes(path: str) -> int | None:
    """How large the body of a POST to this address may be; None if there is no such address."""
    if path == UPLOAD:
        return MOST_BYTES
    parts = path.split("/")[1:]
    known = parts == ["start"] or (len(parts) == 3 and (parts[0], parts[2]) in (("run", "resume"), ("started", "stop")))
    return _MOST_OF_A_FORM if known else None


class Starting:
    """The addresses of starting. Their actions are plain functions, which run in threads."""

    def __init__(self, library: Library, pages: Pages, *, confined: bool) -> None:
        """`confined`: other machines can reach the server."""
        self._library, self._pages, self._confined = library, pages, confined
        self._drafts, self._started = Drafts(), StartedTrainings()

    @property
    def routes(self) -> list[Route]:
        """Every address."""
        return [
            Route("/start", self.empty),
            Route("/start", self._posted(self.save), methods=["POST"]),
            Route(UPLOAD, self.upload, methods=["POST"]),
            Route("/start/{draft}", self.draft),
            Route("/started/{name}", self.started),
            Route("/started/{name}/stop", self._posted(self.stop), methods=["POST"]),
            Route("/run/{run}/resume", self._posted(self.resume), methods=["POST"]),
        ]

    def end(self) -> None:
        """End the commands whose answers pages show; trainings go on."""
        self._drafts.end()

    def empty(self, _: Request) -> Response:
        """GET /start: the form."""
        return self._page(None, Form(model=base_models(_usual_model())[0]))

    def draft(self, request: Request) -> Response:
        """GET /start/DRAFT: the form, and what the commands have said about it."""
        draft = self._drafts.find(request.path_params["draft"])
        if draft is None:
            return self._pages.missing(_NO_DRAFT)
        return self._page(draft, draft.form)

    def save(self, _: Request, given: dict[str, str]) -> Response:
        """POST /start: take the form, and check the data, show the plan, or start what was planned."""
        draft = self._drafts.find(given.get("draft", ""))
        if given.get("do") == "train":
            return self._train(draft)
        try:
            form = read_form(given, models=base_models(_usual_model()), confined=self._confined)
        except RefusedForm as error:
            return self._page(draft, _as_sent(given), refused=str(error), status=422)
        kinds: tuple[Kind, ...] = ("plan",) if given.get("do") == "plan" else ("check", "show")
        if must_be_fetched(form.model):
            kinds = ("fetch",)
        draft = self._drafts.save(given.get("draft", ""), form)
        try:
            self._drafts.run(draft, *kinds)
        except TooManyJobs:
            return self._page(draft, form, refused="Too many commands run at once; wait until one of them has ended.", status=429)
        return RedirectResponse(f"/start/{draft.name}", 303)

    def _train(self, draft: Draft | None) -> Response:
        if draft is None:
            return self._pages.missing(_NO_DRAFT)
        if draft.started is not None:
            return self._page(draft, draft.form, refused="This training has been started already.", status=409)
        if not draft.is_planned:
            return self._page(draft, draft.form, refused="Look at the plan of these settings first.", status=409)
        try:
            record = self._started.start(draft.form.train())
        except RefusedStart as error:
            return self._page(draft, draft.form, refused=str(error), status=409)
        self._drafts.note_start(draft, record.name)
        return RedirectResponse(f"/started/{record.name}", 303)

    def started(self, request: Request) -> Response:
        """GET /started/NAME: what a training prints; the page of its run once there is one."""
        record = self._started.find(request.path_params["name"])
        if record is None:
            return self._pages.missing("No training of this name was started here.")
        record = self._started.with_run(record, self._recent())
        alive, ended = self._started.is_alive(record), self._started.status(record.name)
        paths = None if record.run is None else self._library.find(record.run)
        if alive and paths is not None and "log" not in request.query_params and writes(record, paths):
            return RedirectResponse(f"/run/{record.run}", 303)
        printed = newest(self._started.printed(record.name))
        log = str(nearby(self._started.log(record.name)))
        return self._pages.render("started.html", record=record, alive=alive, ended=ended, printed=printed, log=log)

    def stop(self, request: Request, _: dict[str, str]) -> Response:
        """POST /started/NAME/stop: save a checkpoint and end."""
        name = request.path_params["name"]
        record = self._started.find(name)
        if record is None:
            return self._pages.missing("No training of this name was started here.")
        record = self._started.with_run(record, self._recent())
        paths = None if record.run is None else self._library.find(record.run)
        try:
            self._started.stop(name, paths)
        except RefusedStart as error:
            return self._refused(str(error))
        return RedirectResponse(f"/run/{record.run}" if record.run is not None else f"/started/{name}", 303)

    def resume(self, request: Request, _: dict[str, str]) -> Response:
        """POST /run/ID/resume."""
        paths = self._library.find(request.path_params["run"])
        if paths is None:
            return self._pages.missing("There is no such run.")
        if not self._can_resume(paths):
            return self._refused("This run cannot go on: it trains, has finished, or has saved no checkpoint.")
        try:
            record = self._started.start(["train-resume", str(nearby(paths.root))], run=paths.run_id)
        except RefusedStart as error:
            return self._refused(str(error))
        return RedirectResponse(f"/started/{record.name}", 303)

    async def upload(self, request: Request) -> Response:
        """POST /start/upload?name=NAME with the bytes of a file; the answer is its path."""
        parts = request.stream()
        try:
            place = await receive(request.query_params.get("name", ""), int(request.headers["content-length"]), parts)
        except RefusedUpload as error:
            return PlainTextResponse(f"{error}\n", error.status, {"connection": "close"})
        except OSError as error:
            return PlainTextResponse(f"the file cannot be written: {error.strerror}\n", 507, {"connection": "close"})
        return JSONResponse({"path": str(place)}, 201)

    def controls(self, paths: RunPaths) -> dict[str, Any]:
        """What the page of a run offers: to stop it, to resume it, and what it printed."""
        for each in self._started.records():
            if each.run is None:
                self._started.with_run(each, [paths])
        record = self._started.of_run(paths.run_id)
        alive, asked = record is not None and self._started.is_alive(record), record is not None and record.asked_to_stop
        return {
            "record": record,
            "alive": alive,
            "stop": alive and not asked,
            "stopping": alive and asked,
            "resume": not alive and self._can_resume(paths),
            "command": shown_command(["train-resume", str(nearby(paths.root))]),
        }

    def _can_resume(self, paths: RunPaths) -> bool:
        return self._library.info(paths).state in _RESUMABLE and bool(paths.checkpoints())

    def _recent(self) -> list[RunPaths]:
        return list(self._library.runs().values())

    def _page(self, draft: Draft | None, form: Form, *, refused: str | None = None, status: int = 200) -> Response:
        jobs: dict[Kind, Job | None] = {kind: draft.current(kind) if draft is not None else None for kind in get_args(Kind)}
        return self._pages.render(
            "start.html",
            status,
            draft=draft,
            form=form,
            refused=refused,
            models=base_models(_usual_model()),
            here=Path.cwd().name,
            confined=self._confined,
            fetch=shown_job(jobs["fetch"]),
            check=shown_job(jobs["check"]),
            show=shown_job(jobs["show"]),
            rows=shown_rows(jobs["show"].out if jobs["show"] is not None else ""),
            plan=shown_job(jobs["plan"]),
            planned=shown_plan(jobs["plan"].out if jobs["plan"] is not None else ""),
            train=shown_command(form.train()) if draft is not None and draft.is_planned else None,
            most_uploaded=MOST_BYTES,
        )

    def _refused(self, why: str) -> Response:
        return self._pages.render("refused.html", 409, why=why)

    def _posted(self, action: Action) -> Callable[[Request], Awaitable[Response]]:
        """`action` with the fields of a form."""

        async def answered(request: Request) -> Response:
            if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
                return PlainTextResponse("a form is application/x-www-form-urlencoded\n", 415, {"connection": "close"})
            try:
                body = await asyncio.wait_for(request.body(), _SECONDS_FOR_A_FORM)
                fields = dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=40))
            except (TimeoutError, ClientDisconnect, ValueError):
                return PlainTextResponse("the form cannot be read\n", 400, {"connection": "close"})
            return await run_in_threadpool(action, request, fields)

        return answered


def _as_sent(given: dict[str, str]) -> Form:
    """The form as it was sent, to be corrected and sent again."""
    return Form(**{name: given.get(name, "")[:8000] for name in Form.__dataclass_fields__})


def _usual_model() -> str:
    """The model of the settings; the starter if they cannot be read."""
    try:
        return str(load_config().config.model.name)
    except ConfigError:
        return STARTER
