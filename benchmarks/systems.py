"""The compared systems, their settings and scenarios."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

_ALL = ("docstrings", "rows-256", "rows-2048")
_TUNED = {"micro_batch": 1, "bf16": True, "checkpointing": False, "padding_free": False}


@dataclass(frozen=True)
class System:
    """One trainer with one group of settings."""

    name: str
    title: str
    peer: str
    """The file in benchmarks/peers/ and the environment."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    scenarios: tuple[str, ...] = _ALL
    methods: tuple[str, ...] = ("lora", "full")
    tuned: bool = True
    """Whether these are the best settings of this peer, so that llamahome is compared with it."""


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


def with_precision(one: System, *, bf16: bool) -> System:
    """The same system in the fast dtype of the machine: bfloat16, or float32 if bfloat16 is emulated."""
    title = one.title if bf16 else one.title.replace("bf16-true", "32-true").replace("bf16", "float32")
    return replace(one, title=title, settings={**one.settings, "bf16": bf16})


def system(name: str) -> System:
    """Return the system with this name."""
    return next(each for each in SYSTEMS if each.name == name)


def select_systems(names: str | None, scenario: str, method: str) -> list[System]:
    """Return the systems of a scenario, all or those of the comma-separated `names`. Raises ValueError for an unknown name."""
    known = [each.name for each in SYSTEMS]
    selected = names.split(",") if names else known
    if unknown := sorted(set(selected) - set(known)):
        raise ValueError(f"no system is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [each for each in SYSTEMS if each.name in selected and scenario in each.scenarios and method in each.methods]
