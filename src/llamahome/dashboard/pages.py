"""The pages as HTML, from the templates beside this file: what each page shows, in the words that `runs show` uses."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import jinja2
from starlette.responses import HTMLResponse

from llamahome.config.load import LoadedConfig
from llamahome.dashboard.charts import LOSS, Chart, compared_charts, machine_charts, run_charts
from llamahome.dashboard.events import found_events
from llamahome.dashboard.library import Library, changed_settings
from llamahome.durable import read_object
from llamahome.monitoring.display import metric_name, read_summary
from llamahome.monitoring.lineage import read_lineage
from llamahome.monitoring.readings import show_moment, whole
from llamahome.monitoring.runs import RunInfo, read_records
from llamahome.rundir import RunPaths, as_typed, first_command, nearby, sweep_of
from llamahome.units import show_bytes, show_count, show_seconds

STATES = ("running", "finished", "stopped", "failed", "lost")
_MOST_COMPARED = 8
_EARLY_POINTS = 600
"""POINTS of charts.js."""
_SMALLEST_PART = 1 << 20
"""Bytes of a part of the planned memory that is named."""
_ANSWERS_SHOWN = 12
"""Of one prompt: the first, which is the base's, and the newest."""


class Pages:
    """Renders each page."""

    def __init__(self, library: Library, versions: dict[str, str], *, can_start: bool = False) -> None:
        """`versions` holds a hash of each static file, so that a browser fetches it again only if it has changed."""
        self._library = library
        self._templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals["static"] = lambda name: f"/static/{name}?{versions[name]}"
        self._templates.globals["can_start"] = can_start
        filters = {"count": show_count, "seconds": show_seconds, "when": show_moment, "figure": show_figure, "setting": show_setting}
        self._templates.filters.update(filters | {"size": show_bytes, "json": json.dumps})

    def render(self, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """A page from its template."""
        text = self._templates.get_template(template).render(**values)
        return HTMLResponse(
            text.encode("utf-8", "backslashreplace"), status, {"cache-control": "no-store"}
        )  # names of files may be no UTF-8

    def prepare(self) -> None:
        """Compile what the first pages need, which would take 0.15 s of them: their templates, and the reader of settings."""
        for name in ("runs.html", "run.html", "run_base.html", "base.html", "macros.html", "chart_scripts.html"):
            self._templates.get_template(name)
        for paths in list(self._library.runs().values())[:1]:
            self._library.config(paths)

    def ask_for_token(self, *, wrong: bool) -> HTMLResponse:
        """The page that asks for the token."""
        return self.render("token.html", 401, wrong=wrong)

    def missing(self, what: str) -> HTMLResponse:
        """The page for an address at which there is nothing."""
        return self.render("missing.html", 404, what=what)

    def runs(self, text: str, state: str) -> HTMLResponse:
        """Every run: state, progress, losses."""
        infos = self._library.infos()
        shown = [info for info in infos if text.lower() in info.run_id.lower() and state in ("", info.state)]
        rows = [run_row(info) for info in shown]
        counts = {each: sum(info.state == each for info in infos) for each in STATES}
        return self.render("runs.html", rows=rows, total=len(infos), counts=counts, text=text, state=state, first=first_command())

    def run(self, paths: RunPaths, controls: dict[str, Any] | None = None) -> HTMLResponse:
        """One run: figures, charts, events, checkpoints, settings; `controls` are what starting.py offers."""
        files, info, config = self._library.open(paths), self._library.info(paths), self._library.config(paths)
        machine = files.machine.names or _first_names(paths.metrics_dir / "system.jsonl")
        names = self._names(paths)
        memory = whole(read_object(paths.environment).get("memory_bytes"))
        events = found_events(read_records(paths.metrics_dir / "events.jsonl").records)
        memory_text = show_bytes(memory) if memory is not None else None
        charts = run_charts(names, machine, memory=memory_text, planned=_planned_in_words(paths))
        return self.render(
            "run.html",
            **run_frame(self._library, paths, "overview"),
            figures=figures(info, config),
            controls=controls,
            charts=charts,
            early=_early_losses(paths.run_id, charts),
            events=events[::-1][:200],
            alerts=[event for event in events if event.level != "note"][::-1][:20],
            checkpoints=[(step, as_typed(folder)) for step, folder in paths.checkpoints()[::-1]],
            final=as_typed(paths.final) if paths.final.is_dir() else None,
            settings=changed_settings(config) if isinstance(config, LoadedConfig) else {},
            settings_problem=config if isinstance(config, str) else None,
            lineage=[each.describe() for each in read_lineage(paths)],
        )

    def _names(self, paths: RunPaths) -> list[str]:
        """The metrics of a run, as far as they are known without reading all of it."""
        return self._library.open(paths).metrics.names or _first_names(paths.metrics_dir / "metrics.jsonl")

    def samples(self, paths: RunPaths) -> HTMLResponse:
        """The answers to each held-out prompt, step by step."""
        prompts: dict[str, list[dict[str, Any]]] = {}
        for record in read_records(paths.metrics_dir / "samples.jsonl").records:
            if isinstance(record.get("prompt"), str) and whole(record.get("step")) is not None:
                prompts.setdefault(record["prompt"], []).append(record)
        shown = []
        for prompt, answers in prompts.items():
            kept = answers if len(answers) <= _ANSWERS_SHOWN else [answers[0], *answers[1 - _ANSWERS_SHOWN :]]
            shown.append({"prompt": prompt, "reference": kept[0].get("reference"), "answers": kept, "left_out": len(answers) - len(kept)})
        return self.render("samples.html", **run_frame(self._library, paths, "samples"), prompts=shown)

    def system(self, paths: RunPaths) -> HTMLResponse:
        """The machine: what it is, and how much of it was used."""
        files = self._library.open(paths)
        files.machine.update()
        environment = read_object(paths.environment)
        return self.render(
            "system.html",
            **run_frame(self._library, paths, "system"),
            charts=machine_charts(files.machine.names),
            environment=_environment_rows(environment),
            packages=_packages(environment.get("packages")),
        )

    def compare(self, run_ids: Sequence[str]) -> HTMLResponse:
        """Several runs: the settings that differ, their figures, and their curves together."""
        known = self._library.runs()
        chosen = [known[run_id] for run_id in dict.fromkeys(run_ids) if run_id in known][:_MOST_COMPARED]
        infos = [self._library.info(paths) for paths in chosen]
        configs = [self._library.config(paths) for paths in chosen]
        unknown = [run_id for run_id in run_ids if run_id not in known]
        return self.render(
            "compare.html",
            infos=infos,
            rows=[run_row(info) for info in infos],
            differing=differing_settings(configs),
            charts=compared_charts([name for paths in chosen for name in self._names(paths)]) if len(chosen) > 1 else [],
            unknown=unknown,
            most=_MOST_COMPARED,
            left_out=max(0, len(set(run_ids)) - len(unknown) - len(chosen)),
        )


def run_frame(library: Library, paths: RunPaths, page: str) -> dict[str, Any]:
    """What the head of every page of a run shows."""
    info = library.info(paths)
    return {"info": info, "row": run_row(info), "page": page, "folder": str(nearby(paths.root)), "typed": as_typed(paths.root)}


def planned_memory(paths: RunPaths) -> dict[str, int]:
    """Bytes that the main process was planned to take when the run began, by purpose; empty if they are not recorded."""
    summary = read_summary(paths.metrics_dir)
    return dict(summary.planned_memory or {}) if summary is not None else {}


def _planned_in_words(paths: RunPaths) -> str | None:
    parts = planned_memory(paths)
    beside = parts.pop("beside", 0)
    words = [f"{name} {show_bytes(size)}" for name, size in parts.items() if size >= _SMALLEST_PART]
    return ", ".join([*words, f"Python and its libraries {show_bytes(beside)}"] if beside else words) or None


def _early_losses(run_id: str, charts: Sequence[Chart]) -> str | None:
    """The address of the losses, which the browser asks for while it reads the scripts; None before there are any."""
    lines = next(chart.lines for chart in charts if chart.name == LOSS.name)
    query = {"names": ",".join(name for name, _ in lines), "points": _EARLY_POINTS, "x": "step", "hurry": 1}
    return f"/api/run/{run_id}/curves?{urlencode(query)}" if lines else None


def run_row(info: RunInfo) -> dict[str, Any]:
    """A run as texts, for tables."""
    sweep = sweep_of(info.folder)
    share = min(1.0, (info.step or 0) / info.horizon) if info.horizon else 0.0
    return {
        "id": info.run_id,
        "state": info.state,
        "step": "–" if info.step is None else f"{info.step:,}",
        "horizon": f"{info.horizon:,}" if info.horizon else None,
        "share": round(share, 4),
        "early": f"({info.ended_early})" if info.ended_early else "",
        "loss": show_figure(info.loss),
        "eval_loss": show_figure(info.eval_loss),
        "tokens": "–" if info.tokens is None else show_count(info.tokens),
        "started": show_moment(info.started),
        "sweep": None if sweep is None else str(nearby(sweep)),
    }


def figures(info: RunInfo, config: LoadedConfig | str) -> list[tuple[str, str, str]]:
    """The figures at the head of a run's page: an id that run.js fills, a label, and the value that is known without the curves."""
    metric = str(config.config.evaluation.metric) if isinstance(config, LoadedConfig) else "loss"
    return [
        ("loss", "Training loss", show_figure(info.loss)),
        ("eval-loss", "Held-out loss", show_figure(info.eval_loss)),
        ("best", "Best held-out loss" if metric == "loss" else f"Best {metric_name(metric).replace('_', ' ')}", "–"),
        ("speed", "Tokens per second", "–"),
        ("tokens", "Tokens", "–" if info.tokens is None else show_count(info.tokens)),
        ("left", "Time left" if info.state == "running" else "Time", "–"),
    ]


def differing_settings(configs: Sequence[LoadedConfig | str]) -> list[tuple[str, list[str]]]:
    """Key and values of each setting that is not the same in all runs; a run whose settings cannot be read shows `?`."""
    from llamahome.config.describe import settings

    found = []
    for key, setting in settings().items():
        values = [show_setting(setting.of(config.config)) if isinstance(config, LoadedConfig) else "?" for config in configs]
        if len({value for value in values if value != "?"}) > 1:
            found.append((key, values))
    return found


def _first_names(path: Path) -> list[str]:
    """The metrics in the first 64 KiB of a file, to know the charts of a run without reading all of it."""
    from llamahome.monitoring.series import parse

    try:
        with path.open("rb") as file:
            content = file.read(65536)
    except OSError:
        return []
    records, _ = parse(content[: content.rfind(b"\n") + 1])
    return list(dict.fromkeys(name for record in records for name in record if name not in ("t", "step")))


def _packages(found: object) -> list[tuple[str, str]]:
    return sorted((name, str(version)) for name, version in found.items()) if isinstance(found, dict) else []


def _texts(found: object) -> list[str]:
    return list(map(str, found)) if isinstance(found, list) else []


def _environment_rows(environment: dict[str, Any]) -> list[tuple[str, str]]:
    words = _texts(environment.get("command"))
    rows = [("command", shlex.join(["llamahome", *words[1:]]))] if words else []
    for name in ("processor", "cpus", "torch_threads", "cpu_capability", "platform", "python"):
        rows.append((name.replace("_", " "), str(environment.get(name, ""))))
    if (memory := whole(environment.get("memory_bytes"))) is not None:
        rows.append(("memory", show_bytes(memory)))
    rows.append(("GPUs", ", ".join(_texts(environment.get("gpus"))) or "none"))
    return [(name, text) for name, text in rows if text]


def show_figure(value: float | None) -> str:
    """A loss or another figure with four decimals."""
    return "–" if value is None else f"{value:,.4f}"


def show_setting(value: Any) -> str:
    """The value of a setting as one types it."""
    if isinstance(value, bool) or value is None or isinstance(value, list | tuple | dict):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)
