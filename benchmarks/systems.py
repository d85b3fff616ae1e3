"""Who takes part, with which settings, in which scenarios."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

_ALL = ("docstrings", "rows-256", "rows-2048")
_TUNED = {"micro_batch": 1, "bf16": True, "checkpointing": False, "padding_free": False}


@dataclass(frozen=True)
class System:
    """One trainer with one setting."""

    name: str
    title: str
    peer: str
    """Its file in benchmarks/peers/ and its environment."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    scenarios: tuple[str, ...] = _ALL
    methods: tuple[str, ...] = ("lora", "full")
    tuned: bool = True
    """Whether it stands for the best that this peer can do, and so is one of those to beat."""


SYSTEMS = (
    System("ours", "llamahome", "ours"),
    System("plain", "plain PyTorch loop, bf16, one row at a time", "plain"),
    System("trl", "TRL 1.16, bf16, micro-batch 1", "trl", _TUNED),
    System(
        "trl-padding-free",
        "TRL 1.16, bf16, padding-free",
        "trl",
        {**_TUNED, "micro_batch": 0, "padding_free": True},
        ("docstrings",),
    ),
    System("trl-batch", "TRL 1.16, bf16, the step in one batch", "trl", {**_TUNED, "micro_batch": 0}, ("rows-256",)),
    System("litgpt", "litgpt 0.5.13, bf16-true, micro-batch 1", "litgpt"),
    System(
        "trl-default",
        "TRL 1.16, bf16, its default batching",
        "trl",
        {**_TUNED, "micro_batch": 8, "checkpointing": True},
        ("docstrings",),
        ("lora",),
        tuned=False,
    ),
)


def precise(one: System, *, bf16: bool) -> System:
    """The same system in the type that is fast on the machine: bfloat16, or float32 where that is emulated."""
    title = one.title if bf16 else one.title.replace("bf16-true", "32-true").replace("bf16", "float32")
    return replace(one, title=title, settings={**one.settings, "bf16": bf16})


def system(name: str) -> System:
    """The one with this name."""
    return next(each for each in SYSTEMS if each.name == name)


def chosen(names: str | None, scenario: str, method: str) -> list[System]:
    """The systems with these names, apart by commas, that take part in a scenario; all of them when none is named."""
    known = [each.name for each in SYSTEMS]
    wanted = names.split(",") if names else known
    if unknown := sorted(set(wanted) - set(known)):
        raise ValueError(f"no system is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [each for each in SYSTEMS if each.name in wanted and scenario in each.scenarios and method in each.methods]
