"""Watches the records of a run and raises alerts, each once per episode, with what to do in the run's own numbers.

The rules are in training_alerts.py and machine_alerts.py. They read recorded values only, so they can be applied to the files of any run;
they keep a few numbers each, whatever its length, and never touch the training. Measured: docs/log.md, "Alerts".
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from llamahome.monitoring.episodes import Alert, Facts, Values
from llamahome.monitoring.machine_alerts import machine_rules
from llamahome.monitoring.training_alerts import training_rules


class Watch:
    """All rules for one run."""

    def __init__(self, facts: Facts) -> None:
        self._rules = [*training_rules(facts), *machine_rules(facts)]
        self._rewarded = False
        """Whether the run learns from rewards: its losses are around zero, and neither they nor held-out losses tell how it goes."""

    def observe(self, step: int, values: Values) -> list[Alert]:
        """Read the metrics of a step or a sample of the machine; the alerts whose episodes begin with it."""
        self._rewarded = self._rewarded or "train/reward" in values
        if self._rewarded:
            values = {name: value for name, value in values.items() if not _is_finite_loss(name, value)}
        found = []
        for rule in self._rules:
            finding = rule.observe(step, values)
            if finding is not None:
                found.append(Alert(name=rule.name, step=step, text=finding[0], help=finding[1]))
        return found


def _is_finite_loss(name: str, value: float | None) -> bool:
    return name in ("train/loss", "eval/loss") and value is not None and math.isfinite(value)


class AlertSink:
    """A sink of the recorder that watches what is recorded, and the newest sample of the machine; `raise_` gets each alert."""

    def __init__(self, watch: Watch, raise_: Callable[[Alert], None], *, system: Callable[[], Mapping[str, float]]) -> None:
        self._watch, self._raise, self._system = watch, raise_, system
        self._sampled: Mapping[str, float] = {}

    def log(self, step: int, t: float, metrics: Mapping[str, float]) -> None:
        """Apply the rules; each sample of the machine counts once."""
        found = self._watch.observe(step, metrics)
        sample = self._system()
        if sample is not self._sampled:
            self._sampled = sample
            found += self._watch.observe(step, sample)
        for alert in found:
            self._raise(alert)

    def close(self) -> None:
        """Nothing is open."""


def is_alert(event: Mapping[str, Any]) -> bool:
    """Whether a record of events.jsonl is an alert."""
    return "alert" in (event.get("kind"), event.get("event"))


def said_of(event: Mapping[str, Any]) -> tuple[str, str]:
    """What an alert of events.jsonl says and what to do about it; empty where it says nothing. Older versions had other names."""
    text = next((str(event[name]) for name in ("text", "message", "alert", "name") if event.get(name)), "alert")
    return text, next((str(event[name]) for name in ("help", "advice", "hint") if event.get(name)), "")


_ABOUT_ROWS = ("loss-not-finite", "loss-spike")
"""Alerts that the rows of one step may explain."""


def alert_fields(alert: Alert, rows: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The event that records an alert; `rows` gives the fields about the rows of the step that stands out."""
    about = rows() if alert.name in _ABOUT_ROWS else {}
    return {"event": "alert", "alert": alert.name, "step": alert.step, "text": alert.text, "help": alert.help, **about}
