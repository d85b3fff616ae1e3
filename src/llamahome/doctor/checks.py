"""A check of `llamahome doctor`: what was looked at, how it stands, and the command that mends it. Standard library only."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Check:
    """The answer to one question."""

    name: str
    """Stable, like memory-limit."""
    status: Status
    detail: str
    """One line: what was found."""
    help: str | None = None
    """A command that mends it; None if there is none."""


@dataclass(frozen=True)
class Request:
    """What the user asked doctor for. It is handed to another process as JSON."""

    data: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    """Of --config."""
    flags: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """Dotted key -> (flag, value)."""
    assignments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that belong to llamahome or to a launcher; they are not in the environment of the checks."""
    root: str = "/"
    """The folder that contains proc, sys and dev."""
    scratch: str = ""
    """A folder for files of the checks; it is removed at the end."""
    slow: bool = True
    """Whether to do the checks that take seconds."""
    hub: bool = False
    """Whether to ask the hub for an answer."""

    @property
    def machine(self) -> Path:
        """`root` as a path."""
        return Path(self.root)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Request":
        """The inverse of dataclasses.asdict, also after JSON has made lists of tuples."""
        lists = {name: tuple(values[name]) for name in ("data", "files", "assignments")}
        return cls(**{**values, **lists, "flags": {key: (flag, value) for key, (flag, value) in values["flags"].items()}})


def passed(name: str, detail: str) -> Check:
    """Nothing has to be done."""
    return Check(name, "PASS", detail)


def warned(name: str, detail: str, help: str | None = None) -> Check:
    """It works, but slower, later or not for long."""
    return Check(name, "WARN", detail, help)


def failed(name: str, detail: str, help: str | None = None) -> Check:
    """Training or saving will not work."""
    return Check(name, "FAIL", detail, help)


def summary(checks: Sequence[Check]) -> str:
    """`14 passed, 2 warnings, 1 failed`."""
    counts = {status: sum(check.status == status for check in checks) for status in ("PASS", "WARN", "FAIL")}
    plural = "" if counts["WARN"] == 1 else "s"
    return f"{counts['PASS']} passed, {counts['WARN']} warning{plural}, {counts['FAIL']} failed"


def one_line(text: str, *, most: int = 240) -> str:
    """`text` on one line of at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 4] + " ..."
