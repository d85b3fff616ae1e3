"""The addresses of the dashboard, and what answers each."""

import hashlib
import json
import re
import threading
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from llamahome.dashboard.charts import PLANNED_MEMORY
from llamahome.dashboard.curves import AXES, Axis
from llamahome.dashboard.events import found_events, marks
from llamahome.dashboard.gate import Gate
from llamahome.dashboard.library import Library
from llamahome.dashboard.live import cursor_of, stream, written
from llamahome.dashboard.pages import Pages, run_row
from llamahome.dashboard.planned import planned_memory_line, planned_rates
from llamahome.monitoring.runs import read_records
from llamahome.rundir import RunPaths
from llamahome.web.access import Access, is_loopback

if TYPE_CHECKING:
    from llamahome.dashboard.rows import RowBrowser
    from llamahome.dashboard.starting import Starting

_STATIC = Path(__file__).parent / "static"
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".LICENSE": "text/plain"}
_IMPORT = re.compile(rb'from "\./([\w.]+)"')
_MOST_POINTS = 2000
"""Of a curve; a wide chart has 600 pixels or so."""
_MOST_NAMES = 40

Answer = Callable[[Request, RunPaths], Response]


class _Answers:
    """One method for each address. Those that read files are plain functions, which Starlette runs in threads."""

    def __init__(self, library: Library, pages: Pages, stop: threading.Event, starting: "Starting | None") -> None:
        self._library, self._pages, self._stop, self._starting = library, pages, stop, starting

    @cached_property
    def _rows(self) -> "RowBrowser":
        from llamahome.dashboard.rows import RowBrowser  # tokenizers take seconds to import, and most pages need none

        return RowBrowser(self._library, self._pages)

    def runs(self, request: Request) -> Response:
        """GET /."""
        return self._pages.runs(request.query_params.get("q", "")[:100], request.query_params.get("state", ""))

    def runs_now(self, _: Request) -> Response:
        """GET /api/runs: what the table of runs shows, to renew it."""
        return _json([run_row(info) for info in self._library.infos()])

    def compare(self, request: Request) -> Response:
        """GET /compare?run=ID&run=ID."""
        return self._pages.compare(request.query_params.getlist("run")[:_MOST_NAMES])

    def run(self, _: Request, paths: RunPaths) -> Response:
        """GET /run/ID."""
        return self._pages.run(paths, self._starting.controls(paths) if self._starting is not None else None)

    def samples(self, _: Request, paths: RunPaths) -> Response:
        """GET /run/ID/samples."""
        return self._pages.samples(paths)

    def data(self, request: Request, paths: RunPaths) -> Response:
        """GET /run/ID/data?row=NUMBER&only=FILTER."""
        return self._rows.page(paths, request.query_params)

    def system(self, _: Request, paths: RunPaths) -> Response:
        """GET /run/ID/system."""
        return self._pages.system(paths)

    def curves(self, request: Request, paths: RunPaths) -> Response:
        """GET /api/run/ID/curves: the thinned curves of some metrics, and where the live stream goes on."""
        files, asked = self._library.open(paths), request.query_params
        names = asked.get("names", "").split(",")[:_MOST_NAMES]
        axis = _axis(request)
        points, smoothing = _number(asked.get("points"), 600, 10, _MOST_POINTS), _number(asked.get("smooth"), 0, 0, 0.999)
        hurried = names[0] == "train/loss" and axis == "step" and not smoothing and asked.get("hurry") == "1"
        if hurried and (early := files.metrics.first_losses(int(points))) is not None:
            return _json({"complete": False, "cursor": "0-0", "lines": {"train/loss": asdict(early)}})
        files.metrics.update()
        if asked.get("machine") == "1":
            files.machine.update()
            lines = files.metrics.lines_of_times(files.machine, names, axis, points=int(points))
        else:
            lines = files.metrics.lines(names, axis, points=int(points), smoothing=smoothing, together=asked.get("stacked") == "1")
        if "plan/learning_rate" in names:
            lines |= planned_rates(self._library.config(paths), paths, files.metrics, axis)
        if PLANNED_MEMORY in names:
            lines |= planned_memory_line(paths, files.metrics, axis)
        answer = {"complete": True, "cursor": written(files.metrics.cursor), "generation": files.metrics.generation}
        return _json({**answer, "began": files.metrics.began, "lines": {name: asdict(line) for name, line in lines.items()}})

    def marks(self, request: Request, paths: RunPaths) -> Response:
        """GET /api/run/ID/marks: what charts draw at a step, and the best evaluation."""
        files = self._library.open(paths)
        files.metrics.update()
        axis = _axis(request)
        found = marks(found_events(read_records(paths.metrics_dir / "events.jsonl").records))[-500:]
        places = [{**mark, "x": files.metrics.place_of_step(mark["step"], axis)} for mark in found]
        best = files.metrics.best("eval/loss", lowest=True)
        at = None if best is None else {"x": files.metrics.place_of_step(best[0], axis), "step": best[0], "value": best[1]}
        return _json({"marks": places, "best": at, "seconds_per_step": files.metrics.seconds_per_step(), "seconds": files.metrics.seconds})

    async def live(self, request: Request) -> Response:
        """GET /api/run/ID/live?cursor=INODE-OFFSET: what is new, as server-sent events."""
        paths = self._library.find(request.path_params["run"])
        begin = cursor_of(request.headers.get("last-event-id") or request.query_params.get("cursor", "0-0"))
        if paths is None or begin is None:
            return PlainTextResponse("there is no such run, or the cursor is not INODE-OFFSET\n", 404)
        headers = {"cache-control": "no-store"}
        return StreamingResponse(stream(self._library, paths, begin, self._stop), media_type="text/event-stream", headers=headers)

    def of_run(self, answer: Answer) -> Callable[[Request], Response]:
        """`answer` with the run that the address names, or the page that says that there is none."""

        def answered(request: Request) -> Response:
            paths = self._library.find(request.path_params["run"])
            return self._pages.missing("There is no such run.") if paths is None else answer(request, paths)

        return answered

    async def not_found(self, _: Request, error: Exception) -> Response:
        """Any other address."""
        status = error.status_code if isinstance(error, HTTPException) else 500
        return self._pages.missing("There is nothing at this address." if status == 404 else f"This was refused ({status}).")


def _axis(request: Request) -> Axis:
    return next((each for each in AXES if each == request.query_params.get("x")), AXES[0])


def _number(text: str | None, usual: float, low: float, high: float) -> float:
    """A number of the query within its limits; the usual one if it is none."""
    try:
        value = float(text) if text is not None else usual
    except ValueError:
        return usual
    return min(max(value, low), high) if value == value else usual


def _json(content: Any) -> Response:
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))  # in ASCII, because a damaged file may hold halves of characters
    return Response(text, media_type="application/json", headers={"cache-control": "no-store"})


def _static_files() -> dict[str, tuple[bytes, str, str]]:
    """Content, type and hash of each static file, by name; nothing else can be asked for.

    An import in a script gets the hash of the script that it imports, because browsers keep each file for good under its address.
    """
    contents = {path.name: path.read_bytes() for path in _STATIC.iterdir() if path.suffix in _TYPES}
    done: dict[str, tuple[bytes, str, str]] = {}

    def finish(name: str) -> str:
        """Put a file into `done` after those that it imports; its hash."""
        if name not in done:
            hashed = _IMPORT.sub(lambda match: match[0][:-1] + f"?{finish(match[1].decode())}".encode() + b'"', contents[name])
            done[name] = (hashed, _TYPES[Path(name).suffix], hashlib.sha256(hashed).hexdigest()[:12])
        return done[name][2]

    for name in contents:
        finish(name)
    return done


def make_app(access: Access, stop: threading.Event, *, start: ExitStack | None = None) -> ASGIApp:
    """The app; `stop` ends the live streams, so that the server can end.

    With `start` trainings may be started; it ends the commands that then still run for a page. The access needs a key for that.
    """
    files, library = _static_files(), Library()
    pages = Pages(library, {name: version for name, (_, _, version) in files.items()}, can_start=start is not None)
    if start is not None:
        from llamahome.dashboard.starting import Starting, most_bytes  # reads kinds of files, which takes a while to import

        starting, limit = Starting(library, pages, confined=not is_loopback(access.host)), most_bytes
        start.callback(starting.end)
    else:
        starting, limit = None, None
    answers = _Answers(library, pages, stop, starting)
    pages.prepare()

    async def static(request: Request) -> Response:
        found = files.get(request.path_params["name"])
        if found is None:
            return PlainTextResponse("there is no such file\n", 404)
        lasting = "private, max-age=31536000, immutable" if request.url.query == found[2] else "no-cache"
        return Response(found[0], media_type=found[1], headers={"cache-control": lasting})

    run_pages: list[tuple[str, Answer]] = [
        ("/run/{run}", answers.run),
        ("/run/{run}/samples", answers.samples),
        ("/run/{run}/data", answers.data),
        ("/run/{run}/system", answers.system),
        ("/api/run/{run}/curves", answers.curves),
        ("/api/run/{run}/marks", answers.marks),
    ]
    routes = [
        *(starting.routes if starting is not None else []),
        Route("/", answers.runs),
        Route("/compare", answers.compare),
        Route("/api/runs", answers.runs_now),
        Route("/api/run/{run}/live", answers.live),
        Route("/static/{name}", static),
        *[Route(path, answers.of_run(answer)) for path, answer in run_pages],
    ]
    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {HTTPException: answers.not_found}
    middleware = [Middleware(GZipMiddleware, minimum_size=1000)]
    return Gate(Starlette(routes=routes, exception_handlers=handlers, middleware=middleware), access, pages, limit)
