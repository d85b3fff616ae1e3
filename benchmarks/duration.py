"""About how long a benchmark will take, from what its parts took on two idle cores; on other machines it is off in proportion."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environments import missing

_LOADING_S, _STEP_S = 20.0, 9.0
"""Of a pair in the speed part: both loaded, and a step of about 2,000 tokens by each; measured: 7 to 13 s over all scenarios."""
_START_S, _AROUND_S = 25.0, 120.0
"""A start with twenty steps, the mean over the systems; and resuming, saving and preparing."""
_JUDGING_S, _ROW_S, _HELD_S = 60.0, 2.5, 2.0
_INSTALLING_S = 90.0


def pairs_s(given: argparse.Namespace, pairs: int, rounds: int) -> float:
    """Seconds of `pairs` of llamahome and a peer."""
    return pairs * (_LOADING_S + (given.warmup + rounds * given.steps) * _STEP_S)


def start_s(systems: int, rounds: int) -> float:
    """Seconds of the start part; the first start of each is cold and counts for none of the rounds."""
    return systems * (rounds + 1) * _START_S + _AROUND_S


def quality_s(given: argparse.Namespace) -> float:
    """Seconds of the quality part."""
    return float(_JUDGING_S + given.rows * _ROW_S + given.held * _HELD_S)


def told(seconds: float, peers: Sequence[str], cache: Path) -> str:
    """The line that the benchmark begins with."""
    absent = missing(peers, cache)
    minutes = max(2, math.ceil((seconds + len(absent) * _INSTALLING_S) / 60))
    words = f"about {minutes} minutes on two idle cores"
    return f"{words}, with environments to make for {', '.join(absent)}" if absent else words
