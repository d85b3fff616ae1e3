"""What took the time of profiled steps, by kind of layer, from the events of torch.profiler.

The own time of an event (without the events inside it) belongs to the innermost range around it. An operation of the backward pass belongs
to the range of the forward operation that recorded it: both carry the same sequence number. On an accelerator its time counts, not that of
the processor that queues the work. Products with a side as long as an adapter's rank are LoRA's, if they are operations of their own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

STEP, PART, KIND = "step ", "part: ", "layer: "
"""How the names of ranges begin; they are seen in the trace as well."""

_NODE = "autograd::engine::evaluate_function: "
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
_PARTS = {
    "data": "data",
    "exchange": "exchange",
    "update": "optimizer",
    "evaluate": "evaluation",
    "save": "saving",
    "forward": "head and loss",
}
_LORA, _BACKWARD, _BETWEEN = "LoRA", "backward, rest", "between the parts"
_TOP = 12


@dataclass(frozen=True)
class Measured:
    """Seconds of all profiled steps together."""

    steps: int
    wall: float
    forward: Mapping[str, float]
    """By kind; also everything that is neither forward nor backward."""
    backward: Mapping[str, float]
    operations: list[tuple[str, float, int]]
    """Name, own seconds and count of the operations that took longest."""
    on_device: bool
    """Whether the times are those of an accelerator."""

    @property
    def seconds_per_step(self) -> float:
        """Wall time of a step."""
        return self.wall / self.steps if self.steps else 0.0


def measure(events: Iterable[Any], ranks: set[int]) -> Measured:
    """Sum the events of a profile (torch.autograd.profiler_util.FunctionEvent)."""
    own = [event for event in events if event.device_type.name == "CPU" and not event.is_async]
    on_device = any(event.self_device_time_total > 0 for event in own)
    steps = [event for event in own if event.name.startswith(STEP) and _has_pass(event)]
    places = _Places(own)
    forward: dict[str, float] = {}
    backward: dict[str, float] = {}
    operations: dict[str, tuple[float, int]] = {}
    for event in own:
        found = places.of(event, ranks)
        if found is None:
            continue
        kind, is_backward = found
        seconds = (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6
        sums = backward if is_backward else forward
        sums[kind] = sums.get(kind, 0.0) + seconds
        if not event.name.startswith((STEP, PART, KIND)):
            before, count = operations.get(event.name, (0.0, 0))
            operations[event.name] = before + seconds, count + 1
    longest = sorted(((name, seconds, count) for name, (seconds, count) in operations.items()), key=lambda each: -each[1])[:_TOP]
    wall = sum(event.time_range.elapsed_us() for event in steps) / 1e6
    return Measured(len(steps), wall, forward, backward, longest, on_device)


def _has_pass(step: Any) -> bool:
    """Whether anything was computed: at the end of a run the loop asks for rows once more, and there are none."""
    return any(child.name == f"{PART}forward" for child in step.cpu_children)


class _Places:
    """Where in a step an event belongs."""

    def __init__(self, events: list[Any]) -> None:
        self._known: dict[int, tuple[str | None, str | None, Any]] = {}
        self._recorded: dict[tuple[int, int], Any] = {}
        """(thread, sequence number) -> the forward operation that a node of the backward pass came from: the last one with the number."""
        for event in events:
            if event.fwd_thread == 0 and event.sequence_nr >= 0 and not event.name.startswith((STEP, PART, KIND, _NODE)):
                before = self._recorded.get((event.thread, event.sequence_nr))
                if before is None or event.time_range.start >= before.time_range.start:
                    self._recorded[event.thread, event.sequence_nr] = event

    def of(self, event: Any, ranks: set[int]) -> tuple[str, bool] | None:
        """Kind and whether it is of the backward pass; None for work beside the steps, such as that of the loader's thread."""
        part, kind, node = self._around(event)
        if part is None and node is None:
            return None
        if part in ("evaluate", "save", "data", "exchange", "update"):
            return _PARTS[part], False
        is_backward = node is not None or part == "backward"
        if kind is None and node is not None:
            source = self._recorded.get((node.fwd_thread, node.sequence_nr))
            if source is not None:
                source_part, kind, _ = self._around(source)
                kind = kind or _PARTS.get(source_part or "")
        if kind is not None and ranks and event.name in _PRODUCTS and _has_side(event.input_shapes, ranks):
            kind = _LORA
        if kind is None:
            kind = _BACKWARD if is_backward else _PARTS.get(part or "", _BETWEEN)
        return kind, is_backward

    def _around(self, event: Any) -> tuple[str | None, str | None, Any]:
        """Innermost part, innermost kind and node of the backward pass around `event`; a step outside of its parts is the part ""."""
        if (known := self._known.get(id(event))) is not None:
            return known
        part, kind, node = self._around(event.cpu_parent) if event.cpu_parent is not None else (None, None, None)
        if event.name.startswith(PART):
            part, kind, node = event.name.removeprefix(PART), None, None
        elif event.name.startswith(KIND):
            kind = event.name.removeprefix(KIND)
        elif event.name.startswith(STEP):
            part = ""
        elif event.name.startswith(_NODE):
            node, kind = event, None
        self._known[id(event)] = part, kind, node
        return part, kind, node


def _has_side(shapes: Any, ranks: set[int]) -> bool:
    return any(len(shape) >= 2 and not ranks.isdisjoint(shape[-2:]) for shape in shapes or () if isinstance(shape, list | tuple))


def table(measured: Measured, first: int, last: int) -> list[str]:
    """The lines of the table, the kind that took longest first."""
    if not measured.steps:
        return ["no step was profiled"]
    kinds = sorted({*measured.forward, *measured.backward}, key=lambda kind: -_total(measured, kind))
    whole = sum(_total(measured, kind) for kind in kinds) or 1.0
    which = f"step {first}" if first == last else f"steps {first} to {last}"
    clock = "the accelerator" if measured.on_device else "this process"
    lines = [f"{which}: {measured.seconds_per_step:.3f} s a step with the profiler on, which makes small operations slower", ""]
    lines += [f"time of {clock}, ms a step", f"{'':<20}{'all':>10}{'share':>9}{'forward':>11}{'backward':>11}"]
    for kind in kinds:
        ahead, back = (1000 * sums.get(kind, 0.0) / measured.steps for sums in (measured.forward, measured.backward))
        share = _total(measured, kind) / whole
        lines.append(f"{kind:<20}{ahead + back:>10.1f}{share:>9.1%}{ahead:>11.1f}{f'{back:.1f}' if back else '-':>11}")
    lines += [
        "",
        "LoRA: the products that are operations of their own; where one product computes a layer with its adapter, both count as the layer",
    ]
    lines += ["", "operations with the most time of their own", f"{'':<60}{'ms a step':>10}{'calls':>9}"]
    lines += [f"{name[:58]:<60}{1000 * seconds / measured.steps:>10.1f}{count:>9,}" for name, seconds, count in measured.operations]
    return lines


def _total(measured: Measured, kind: str) -> float:
    return measured.forward.get(kind, 0.0) + measured.backward.get(kind, 0.0)
