"""Settings that are written with a unit, like "10 min", "500 steps" or "1:2" machines: their types, judged as they are read."""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from llamahome.units import parse_interval, parse_nodes, parse_rows

PositiveInt = Annotated[int, Field(ge=1)]


def _interval_text(text: str) -> str:
    parse_interval(text)
    return text


def _interval_or_auto(text: str) -> str:
    return text if text == "auto" else _interval_text(text)


def _seconds_text(text: str) -> str:
    if parse_interval(text).unit != "seconds":
        raise ValueError(f"{text!r} is not a time; use s, min or h")
    return text


IntervalText = Annotated[str, AfterValidator(_interval_text), Field(examples=["500 steps", "1 epoch", "10 min"])]
AutoInterval = Annotated[str, AfterValidator(_interval_or_auto), Field(examples=["auto", "500 steps", "1 epoch", "10 min"])]
SecondsText = Annotated[str, AfterValidator(_seconds_text), Field(examples=["2 s", "10 min", "1 h"])]


def _rows_text(text: str) -> str:
    parse_rows(text)
    return text


def _nodes_text(text: str) -> str:
    parse_nodes(text)
    return text


def _counted(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


Nodes = Annotated[PositiveInt | Annotated[str, AfterValidator(_nodes_text)], BeforeValidator(_counted), Field(examples=["2", "1:2"])]
Amount = Annotated[float, Field(ge=0)] | Annotated[str, AfterValidator(_rows_text)]
