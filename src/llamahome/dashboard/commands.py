"""The commands that the page of a new training runs, as words, made from the fields of its form and checked before anything starts.

A child process gets the words as they are, never through a shell, so a field cannot become another option or another command. The free
lines of settings can: two settings hold a command and a file of Python. Whoever holds the token on this machine may type these in a
terminal too; if other machines can reach the server, the settings and the paths that can be chosen are limited.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from llamahome.rundir import BASE_MODELS, STARTER

ROWS_SHOWN = 3
_LONGEST = 1000
"""Characters of a field."""
_MOST_SETTINGS = 50
_FROM_AFAR = re.compile(r"(training|lora|checkpoint|evaluation|schedule|data)\.\w+")
_NOT_FROM_AFAR = ("evaluation.metric", "data.eval_path", "data.mixture")
"""Settings of these sections that name files."""


class RefusedForm(Exception):
    """A field that cannot be used; the text says which and why."""


@dataclass(frozen=True)
class Form:
    """What the fields of the page hold."""

    data: str = ""
    """A file or folder, as it is typed."""
    model: str = STARTER
    method: str = "lora"
    epochs: str = ""
    max_steps: str = ""
    learning_rate: str = ""
    settings: str = ""
    """Lines `section.key=value`."""

    @property
    def assignments(self) -> list[str]:
        """The lines of settings that say something."""
        return [line.strip() for line in self.settings.splitlines() if line.strip()]

    def fetch(self) -> list[str]:
        """`models fetch`."""
        return ["models", "fetch", self.model]

    def check(self) -> list[str]:
        """`data check`."""
        return ["data", "check", self._path, *self._reading]

    def show(self) -> list[str]:
        """`data show` of the first rows."""
        return ["data", "show", self._path, "--rows", str(ROWS_SHOWN), *self._reading]

    def plan(self) -> list[str]:
        """`plan`."""
        return ["plan", self._path, *self._course]

    def train(self) -> list[str]:
        """`train`."""
        return ["train", self._path, *self._course]

    @property
    def _path(self) -> str:
        return f"./{self.data}" if self.data.startswith("-") else self.data  # not an option

    @property
    def _reading(self) -> list[str]:
        return ["--model", self.model, *_set(self.assignments)]

    @property
    def _course(self) -> list[str]:
        words = ["--model", self.model, "--method", self.method]
        for option, value in (("--epochs", self.epochs), ("--max-steps", self.max_steps)):
            words += [option, value] if value else []
        rate = [f"training.learning_rate={self.learning_rate}"] if self.learning_rate else []
        return [*words, *_set([*rate, *self.assignments])]


def _set(assignments: Sequence[str]) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


def read_form(given: Mapping[str, str], *, models: Sequence[str], confined: bool) -> Form:
    """The form with the fields that were sent. Raises RefusedForm.

    `confined`: other machines can reach the server, so data lie in the working folder and settings name no file and no command.
    """
    form = Form(**{field.name: given[field.name].strip() for field in fields(Form) if given.get(field.name) is not None})
    for field in fields(Form):
        _require_plain(field.name, getattr(form, field.name))
    if not form.data:
        raise RefusedForm("Name a file or a folder with rows, or upload a file.")
    if form.model not in models:
        raise RefusedForm(f"There is no base model {form.model!r} here.")
    if form.method not in ("lora", "full"):
        raise RefusedForm(f"The method is lora or full, not {form.method!r}.")
    for name in ("epochs", "max_steps", "learning_rate"):
        _require_number(name, getattr(form, name))
    if len(form.assignments) > _MOST_SETTINGS:
        raise RefusedForm(f"More than {_MOST_SETTINGS} settings belong into a file: .config/training_config.yaml.")
    if confined:
        _require_inside(form.data)
        for assignment in form.assignments:
            _require_harmless(assignment)
    return form


def _require_plain(name: str, value: str) -> None:
    longest = _LONGEST * (8 if name == "settings" else 1)
    allowed = "\r\n\t" if name == "settings" else ""
    if len(value) > longest or any(not (letter.isprintable() or letter in allowed) for letter in value):
        raise RefusedForm(f"The field {name.replace('_', ' ')} is too long or holds control characters.")


def _require_number(name: str, value: str) -> None:
    """The commands say themselves which numbers they take; a value that is none must not look like an option."""
    if value and not re.fullmatch(r"[0-9.eE+][0-9.eE+-]*", value):
        raise RefusedForm(f"{name.replace('_', ' ').capitalize()}: {value!r} is no number.")


def _require_inside(data: str) -> None:
    here, place = Path.cwd(), Path(data).expanduser().resolve()
    if not place.is_relative_to(here) or not place.exists():
        raise RefusedForm(
            "Other machines can reach this server, so it reads only files and folders that are below the folder it was started in."
        )


def _require_harmless(assignment: str) -> None:
    key = assignment.partition("=")[0].strip()
    if not _FROM_AFAR.fullmatch(key) or key in _NOT_FROM_AFAR:
        raise RefusedForm(f"Other machines can reach this server, so {key!r} is set in .config/training_config.yaml or in a terminal.")


def must_be_fetched(model: str) -> bool:
    """Whether the model is the starter and not here yet: commands that run side by side would each download it."""
    return model == STARTER and not (BASE_MODELS / STARTER / "config.json").is_file()


def base_models(usual: str | None) -> list[str]:
    """The base models that can be chosen: the `usual` one of the settings first, those in data/models/base, the starter."""
    here = sorted(path.parent.name for path in BASE_MODELS.glob("*/config.json"))
    return list(dict.fromkeys([*([usual] if usual else []), *here, STARTER]))
