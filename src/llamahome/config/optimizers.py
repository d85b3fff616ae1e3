"""The optimizers that can be chosen, and the memory that each takes."""

from typing import Literal, get_args

OptimizerName = Literal["adamw", "adamw_8bit", "adafactor", "muon"]
STATE_BYTES: dict[str, float] = {"adamw": 8.0, "adamw_8bit": 2.04, "adafactor": 0.1, "muon": 4.0}
"""Bytes of state per trained weight: two moments in float32, two in a byte with a scale per 256, a row and a column, one momentum.
Muon keeps two moments for embedding and head, which count as one here, because they are a small share of a large model."""
assert set(STATE_BYTES) == set(get_args(OptimizerName))
