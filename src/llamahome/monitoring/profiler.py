"""Profiles some steps of a run with torch.profiler: a trace that Perfetto opens, and a table of what took the time by kind of layer.

The loop knows nothing of it: the parts of a step are ranges of the clock that the loop gets (`ProfiledClock`), and the kinds of layers are
hooks on the modules, which are there only during these steps. A run without a profile gets a plain clock. Cost: the profiled steps are
slower, most of all where operations are small, and the step after them waits until the events are read and written.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.profiler import profile, record_function

from llamahome import durable
from llamahome.monitoring.profile_table import KIND, PART, STEP, measure, table
from llamahome.monitoring.throughput import PartClock

Kinds = Iterable[tuple[nn.Module, str]]


@dataclass(frozen=True)
class ProfilePlan:
    """What is profiled, and where the results go."""

    first: int
    last: int
    """Steps, both included."""
    folder: Path
    kinds: Callable[[], Kinds]
    """The modules whose time is counted, each with its kind."""
    ranks: set[int]
    """Of the LoRA adapters."""
    say: Callable[[str], None]

    @property
    def name(self) -> str:
        """`steps-20-25`."""
        return f"steps-{self.first}-{self.last}"


class StepProfiler:
    """Starts before the first step of a plan and writes trace and table after the last one, or at `close` if the run ends earlier."""

    def __init__(self, plan: ProfilePlan, *, done: int) -> None:
        """`done` is the number of steps that the run has done."""
        self._plan = plan
        self._step = done
        self._profile: Any = None
        self._open: Any = None
        self._hooks: list[Any] = []
        self._first: int | None = None
        self._worked = False
        """Whether a pass of the current step has begun."""
        self._written = False

    @property
    def changes(self) -> bool:
        """Whether the next step starts the profile, or writes it first: 0.1 s, and 15 s for two steps of the starter."""
        if self._profile is not None:
            return self._step >= self._plan.last
        return not self._written and self._plan.first <= self._step + 1 <= self._plan.last

    def next_step(self) -> None:
        """The loop begins another step."""
        self._step += 1
        self._worked = False
        self._end_step()
        if self._profile is not None and self._step > self._plan.last:
            self._finish(self._step - 1)
        elif self._profile is None and not self._written and self._plan.first <= self._step <= self._plan.last:
            self._begin()
        if self._profile is not None:
            self._open = record_function(f"{STEP}{self._step}")
            self._open.__enter__()

    def range(self, name: str) -> AbstractContextManager[Any]:
        """Mark the block as a part of the step while steps are profiled."""
        self._worked |= name == "forward"
        return record_function(PART + name) if self._profile is not None else nullcontext()

    def close(self) -> None:
        """Write what was profiled if the run ended within the steps, and say so if it never reached them."""
        self._end_step()
        if self._profile is not None:
            self._finish(self._step if self._worked else self._step - 1)
        if not self._written:
            self._plan.say(f"nothing was profiled: the run did none of the steps {self._plan.first} to {self._plan.last}")
            self._written = True

    def _begin(self) -> None:
        self._first = self._step
        self._hooks = [hook for module, kind in self._plan.kinds() for hook in _mark(module, KIND + kind)]
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise kineto prints lines for its developers
        self._profile = profile(record_shapes=True)
        self._profile.start()

    def _end_step(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None

    def _finish(self, last: int) -> None:
        """Stop, and write trace and table. A disk that cannot be written is reported, and the run goes on."""
        self._profile.stop()
        profiled, self._profile, self._written = self._profile, None, True
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        trace = self._plan.folder / f"trace-{self._plan.name}.json.gz"
        report = self._plan.folder / f"table-{self._plan.name}.txt"
        measured = measure(profiled.events(), self._plan.ranks)
        try:
            self._plan.folder.mkdir(parents=True, exist_ok=True)
            profiled.export_chrome_trace(str(trace))
            durable.write_whole(report, "\n".join(table(measured, self._first or last, last)) + "\n", flush=False)
        except OSError as error:
            self._plan.say(f"the profile cannot be written to {self._plan.folder}: {error.strerror or error}; the training is not affected")
            return
        each = f"{measured.seconds_per_step:.2f} s each"
        self._plan.say(f"profiled the steps {self._first} to {last}, {each}: {report} and {trace} (https://ui.perfetto.dev opens it)")


def _mark(module: nn.Module, name: str) -> Iterator[Any]:
    """Hooks that make the forward of `module` a range. A forward that raises leaves its range open, and the profile ends with the run."""
    ranges: list[Any] = []

    def begin(*_: Any) -> None:
        ranges.append(record_function(name))
        ranges[-1].__enter__()

    def end(*_: Any) -> None:
        if ranges:
            ranges.pop().__exit__(None, None, None)

    yield module.register_forward_pre_hook(begin)
    yield module.register_forward_hook(end, always_call=True)


class ProfiledClock(PartClock):
    """A clock whose parts are ranges of a profile; each `data` part begins a step, because the loop asks for its rows first."""

    def __init__(
        self, mark: Callable[[], Any], between: Callable[[Any, Any], float], profiler: StepProfiler, *, watch: Callable[[str], None]
    ) -> None:
        super().__init__(mark, between, watch=watch)
        self._profiler = profiler

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time in the block as `name`, and mark it in the profile."""
        if name == "data":
            with super().part("profile") if self._profiler.changes else nullcontext():
                self._profiler.next_step()
        with self._profiler.range(name), super().part(name):
            yield
