"""The tree of errors: each problem has a stable code, a place, and a remedy; each error has an exit status.

Everything that a user can cause or fix is raised as a LlamaHomeError and shown without a traceback. Anything else is a bug of llamahome
and keeps its traceback. Only cli/ catches LlamaHomeErrors. Exit codes: docs/errors.md.

    LlamaHomeError (1)
    ├── UsageError (2)        the command line
    ├── ConfigError (2)       settings
    ├── DataError (3)         rows
    ├── MachineError (4)      the machine or its installation
    ├── OutOfMemory (5)       a single example does not fit
    ├── Diverged (6)          loss or gradient were not finite too often
    ├── CheckpointError (7)   there is no checkpoint, or it is damaged
    ├── Stopped (75)          stopped by a request; a checkpoint was saved
    └── LeftAtOnce (130)      stopped by a second request
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llamahome.redaction import redact


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong: what, where, and how to fix it."""

    code: str
    """Stable name `area.slug`, listed in docs/errors.md."""
    message: str
    """What is wrong, with the value, in one line without a full stop."""
    where: str | None = None
    """`file:line` or `file:line:column`, or the flag or variable that set the value."""
    excerpt: str | None = None
    """The offending line(s), already cut to a readable length; printed indented."""
    hint: str | None = None
    """A command or setting that fixes it, computed from this problem."""

    def render(self, *, level: str = "error") -> str:
        """The block that is printed on stderr, without a trailing newline and without secrets."""
        place = f"{self.where}: " if self.where else ""
        lines = [f"{level}[{self.code}]: {place}{self.message}"]
        if self.excerpt:
            lines += [f"   {line}" for line in self.excerpt.splitlines()]
        block = redact("\n".join(lines))
        return f"{block}\nhelp: {redact(self.hint, options=False)}" if self.hint else block


class LlamaHomeError(Exception):
    """One or more problems of one stage, all found before it was raised."""

    exit_status = 1

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(problem.render() for problem in self.problems))

    def __reduce__(self) -> tuple[type["LlamaHomeError"], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class UsageError(LlamaHomeError):
    """The command line cannot be understood."""

    exit_status = 2


class ConfigError(LlamaHomeError):
    """A setting is unknown, of the wrong type, out of range, or at odds with another."""

    exit_status = 2


class DataError(LlamaHomeError):
    """A row cannot be used, or the data teaches nothing."""

    exit_status = 3


class MachineError(LlamaHomeError):
    """The machine, its disk, its network or an installed library cannot do what is asked."""

    exit_status = 4


class OutOfMemory(LlamaHomeError):
    """Not even the smallest micro-batch fits."""

    exit_status = 5


class Diverged(LlamaHomeError):
    """Too many steps in a row had a loss or gradient that is not finite."""

    exit_status = 6


class CheckpointError(LlamaHomeError):
    """A checkpoint is missing, damaged, or belongs to other data or another model."""

    exit_status = 7


class Stopped(LlamaHomeError):
    """The run was asked to stop and saved a checkpoint first."""

    exit_status = 75


class LeftAtOnce(LlamaHomeError):
    """The run was asked a second time and left without saving."""

    exit_status = 130
