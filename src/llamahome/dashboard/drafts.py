"""A training that is being prepared on the page: what the form holds, and the commands that were run for it.

An answer is shown as long as its command is the one that the form would give now, so no plan is shown for settings that have changed.
"""

import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llamahome.dashboard.commands import Form
from llamahome.dashboard.draft_files import DraftFiles
from llamahome.dashboard.jobs import Job, Jobs
from llamahome.dashboard.rows import tokens_shown
from llamahome.data.view import Kind as Shade
from llamahome.rundir import DRAFTS
from llamahome.units import many, show_bytes, show_seconds

Kind = Literal["fetch", "check", "show", "plan"]
_KEPT = 20
_MOST_LINES = 400
"""Shown of what a command printed."""
_PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "buffers")


@dataclass
class Draft:
    """One training that is being prepared."""

    name: str
    form: Form
    jobs: dict[Kind, Job] = field(default_factory=dict)
    started: str | None = None
    """The name of the training that it became."""

    def words(self, kind: Kind) -> tuple[str, ...]:
        """The command of a kind for the form as it is now."""
        form = self.form
        return tuple({"fetch": form.fetch, "check": form.check, "show": form.show, "plan": form.plan}[kind]())

    def current(self, kind: Kind) -> Job | None:
        """The newest command of a kind, if it is that of the form."""
        job = self.jobs.get(kind)
        return job if job is not None and job.words == self.words(kind) else None

    @property
    def is_planned(self) -> bool:
        """Whether the plan for this form has been shown, or why there is none."""
        plan = self.current("plan")
        return plan is not None and plan.status is not None


class Drafts:
    """The newest drafts by name; an older one ends its commands. Their forms are kept on the disk. Threads may share it."""

    def __init__(self, folder: Path = DRAFTS) -> None:
        self._lock = threading.Lock()
        self._jobs = Jobs()
        self._files = DraftFiles(folder, most=_KEPT)
        self._drafts: OrderedDict[str, Draft] = OrderedDict()

    def find(self, name: str) -> Draft | None:
        """The draft of this name; one of an earlier server has its form and no commands yet."""
        with self._lock:
            if name not in self._drafts and (form := self._files.read(name)) is not None:
                self._drafts[name] = Draft(name, form)
            return self._drafts.get(name)

    def save(self, name: str, form: Form) -> Draft:
        """The draft of this name with another form, or a new one if there is none or a training was started from it."""
        with self._lock:
            draft = self._drafts.get(name)
            if draft is None or draft.started is not None:
                draft = Draft(secrets.token_urlsafe(9), form)
                self._drafts[draft.name] = draft
            draft.form = form
            self._files.write(draft.name, form)
            self._drafts.move_to_end(draft.name)
            old = [self._drafts.popitem(last=False)[1] for _ in range(len(self._drafts) - _KEPT)]
        for each in old:
            for job in each.jobs.values():
                self._jobs.end(job)
        return draft

    def note_start(self, draft: Draft, training: str) -> None:
        """The draft has become a training; its form is kept no longer."""
        draft.started = training
        self._files.remove(draft.name)

    def run(self, draft: Draft, *kinds: Kind) -> None:
        """Run the commands of these kinds again, in place of earlier ones. Raises TooManyJobs."""
        for kind in kinds:
            with self._lock:
                before = draft.jobs.pop(kind, None)
            if before is not None:
                self._jobs.end(before)
            job = self._jobs.begin(draft.words(kind), as_json=kind in ("show", "plan"))
            with self._lock:
                draft.jobs[kind] = job

    def end(self) -> None:
        """End every command that still runs."""
        self._jobs.end_all()


def shown_job(job: Job | None) -> dict[str, Any] | None:
    """A command, how far it is, and its messages, for a page."""
    if job is None:
        return None
    status = job.status
    return {
        "command": job.shown,
        "status": status,
        "seconds": round(job.seconds),
        "messages": shortened(job.err),
        "printed": shortened(job.out),
    }


def shortened(text: str) -> str:
    """The first lines of a long text, and how many more there are."""
    lines = text.splitlines()
    kept = "\n".join(lines[:_MOST_LINES])
    return kept if len(lines) <= _MOST_LINES else f"{kept}\n... and {many(len(lines) - _MOST_LINES, 'more line')}"


def newest(text: str) -> str:
    """The last lines of a long text."""
    return "\n".join(text.splitlines()[-_MOST_LINES:])


def shown_rows(printed: str) -> list[dict[str, Any]]:
    """The rows that `data show --json` has printed, with their tokens in spans of one kind."""
    return [_row(row) for row in _objects(printed) if isinstance(row.get("tokens"), list)]


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Each whole line that is a JSON object."""
    for line in text.split("\n")[:-1]:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def _row(row: dict[str, Any]) -> dict[str, Any]:
    tokens = row["tokens"]
    kinds: list[Shade] = [_kind_of(token) for token in tokens]
    return tokens_shown(row.get("row", 0), row.get("source", ""), kinds, [token["text"] for token in tokens])


def _kind_of(token: dict[str, Any]) -> Shade:
    if token.get("cut"):
        return "cut"
    return "learned" if token["target"] else "reference" if token.get("reference") else "context"


def _epochs(count: float) -> str:
    return "1 epoch" if count == 1 else f"{count:,.3g} epochs"


def shown_plan(printed: str) -> dict[str, Any] | None:
    """What `plan --json` has printed, as texts: figures, the parts of the memory, and what is trained."""
    found = next(_objects(printed), None)
    if found is None:
        return None
    step, memory = found["step"], found["step"]["memory_bytes"]
    steps = f"{found['steps']:,}"
    figures = [
        ("Time", show_seconds(found["seconds"]) if found["seconds"] >= 1 else "under 1 s", "without evaluations and saving"),
        ("Memory", show_bytes(memory["total"]), "beside Python and its libraries"),
        ("Steps", steps, f"{_epochs(found['epochs'])} of {many(found['rows'], 'row')}"),
        ("Rows of a step", f"{found['batch_size']:,}", f"about {found['tokens_per_step']:,.0f} tokens"),
        ("Tokens per second", f"{step['tokens_per_s']:,.0f}", ""),
        ("Disk", show_bytes(found["disk_bytes"]), f"a checkpoint is {show_bytes(found['checkpoint_bytes'])}"),
    ]
    return {
        "figures": figures,
        "fits": step["fits"],
        "remedy": step["remedy"],
        "checkpointing": step["gradient_checkpointing"],
        "parts": [(part, show_bytes(memory[part])) for part in _PARTS if memory.get(part)],
        "adapters": found["adapters"],
    }
