"""Types of settings that are written with a unit, like "10 min", "500 steps" or "1:2" machines."""

from collections.abc import Callable
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
    interval = parse_interval(text)
    if interval.unit != "seconds":
        raise ValueError(f"{text!r} is not a time; use s, min or h")
    return interval


def _digits_to_int(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


PositiveInt = Annotated[int, Field(ge=1)]
IntervalText = Annotated[str, _valid(parse_interval), Field(examples=["500 steps", "1 epoch", "10 min"])]
AutoInterval = Literal["auto"] | IntervalText
SecondsText = Annotated[str, _valid(_parse_seconds), Field(examples=["2 s", "10 min", "1 h"])]
StepsText = Annotated[str, _valid(parse_steps), Field(examples=["steps 20-25"])]
Nodes = Annotated[PositiveInt | Annotated[str, _valid(parse_nodes), Field(examples=["1:2"])], BeforeValidator(_digits_to_int)]
Amount = Annotated[float, Field(ge=0)] | Annotated[str, _valid(parse_rows)]
