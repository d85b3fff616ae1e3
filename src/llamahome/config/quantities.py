"""Types of settings that are written with a unit, like "10 min", "500 steps" or "1:2" machines, and names out of a list."""

from collections.abc import Callable
from difflib import get_close_matches
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from llamahome.units import Interval, parse_interval, parse_nodes, parse_rows, parse_steps


def _valid(parse: Callable[[str], object]) -> AfterValidator:
    """Refuse text that `parse` refuses with a ValueError; the setting keeps the text."""

    def check(text: str) -> str:
        parse(text)
        return text

    return AfterValidator(check)


def _parse_seconds(text: str) -> Interval:
    try:
        interval = parse_interval(text)
    except ValueError as error:
        if "more than zero" in str(error):
            raise
        raise ValueError(f"{text!r} is not a time like '30 s', '10 min' or '1 h'") from None
    if interval.unit != "seconds":
        raise ValueError(f"{text!r} is not a time; use s, min or h")
    return interval


def _growing(ages: list[str]) -> list[str]:
    """Refuse times that do not grow from one to the next."""
    seconds = {age: parse_interval(age).value for age in ages}
    for before, after in pairwise(ages):
        if seconds[after] <= seconds[before]:
            ordered = ", ".join(sorted(seconds, key=lambda age: seconds[age]))
            raise ValueError(f"each age must be greater than the one before it, and {after!r} follows {before!r}; write [{ordered}]")
    return ages


def _digits_to_int(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _parse_layers(text: str) -> None:
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and dash and last.isdecimal() and int(first) <= int(last)):
        raise ValueError(f"{text!r} is neither the number of a layer nor a range like 20-29")


TRACKERS = ("trackio", "wandb", "mlflow")


def _known_tracker(name: str) -> None:
    if name not in TRACKERS:
        near = get_close_matches(name.lower(), TRACKERS, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no tracker {name!r}{guess}; those are {', '.join(TRACKERS)} (TensorBoard: monitoring.tensorboard)")


PositiveInt = Annotated[int, Field(ge=1)]
IntervalText = Annotated[str, _valid(parse_interval), Field(examples=["500 steps", "1 epoch", "10 min"])]
AutoInterval = Literal["auto"] | IntervalText
SecondsText = Annotated[str, _valid(_parse_seconds), Field(examples=["2 s", "10 min", "1 h"])]
Ages = Annotated[list[SecondsText], AfterValidator(_growing)]
StepsText = Annotated[str, _valid(parse_steps), Field(examples=["steps 20-25"])]
Nodes = Annotated[PositiveInt | Annotated[str, _valid(parse_nodes), Field(examples=["1:2"])], BeforeValidator(_digits_to_int)]
TrackerName = Annotated[str, _valid(_known_tracker), Field(examples=[*TRACKERS])]
LayerNumbers = Annotated[int, Field(ge=0)] | Annotated[str, _valid(_parse_layers), Field(examples=["20-29"])]
Amount = Annotated[float, Field(ge=0)] | Annotated[str, _valid(parse_rows)]
