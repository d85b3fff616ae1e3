"""The options of `chat` and `serve` that say how answers are generated."""

import math
from typing import Any

import click

from llamahome.cli import options


class Finite(click.FloatRange):
    """A range that NaN and infinity do not belong to."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


_OFF = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None}
"""What has an effect only if tokens are drawn, and the value that is no wish."""

sampling_options = options.together(
    click.option("--temperature", type=Finite(min=0), default=0.0, help="0 always takes the likeliest token."),
    click.option("--top-p", type=Finite(min=0, max=1), default=1.0, help="Draw from the fewest tokens with this probability together."),
    click.option(
        "--top-k", type=click.IntRange(min=0, max=2**31), default=0, help="Draw from this many of the likeliest tokens; 0 is all."
    ),
    click.option(
        "--min-p", type=Finite(min=0, max=1), default=0.0, help="Draw from tokens with this share of the likeliest's probability."
    ),
    click.option("--repetition-penalty", type=Finite(min=1e-6, max=1e6), default=1.0, help="Above 1, tokens come again less often."),
    click.option("--seed", type=click.IntRange(min=-(2**63), max=2**63 - 1), help="The same seed draws the same answer."),
    click.option("--max-new-tokens", type=click.IntRange(min=1, max=2**31), default=512, help="Longest answer in tokens."),
)


def without_effect(values: dict[str, Any]) -> str | None:
    """A line about options that do nothing at temperature 0; None if there are none."""
    idle = [f"--{name.replace('_', '-')}" for name, off in _OFF.items() if values["temperature"] == 0 and values[name] != off]
    if not idle:
        return None
    return f"{', '.join(idle)}: no effect at --temperature 0, which always takes the likeliest token"
