"""Estimates the duration of a benchmark from the durations of its parts on two idle cores."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environments import missing

_LOADING_S, _STEP_S = 20.0, 9.0
"""Of a pair in the speed part: loading both systems, and a step of about 2,000 tokens by each; measured: 7 to 13 s over all scenarios."""
_START_S, _RESUME_SAVE_PREPARE_S = 25.0, 120.0
"""Mean over the systems of a start with twenty steps; resuming, saving and preparing together."""
_JUDGING_S, _ROW_S, _HELD_S = 60.0, 2.5, 2.0
_INSTALLING_S = 90.0


def pairs_s(options: argparse.Namespace, pairs: int, rounds: int) -> float:
    """Seconds of `pairs` pairs of llamahome and a peer."""
    return pairs * (_LOADING_S + (options.warmup + rounds * options.steps) * _STEP_S)


def start_s(systems: int, rounds: int) -> float:
    """Seconds of the start part. Each system starts once more than `rounds`, because the first start is cold."""
    return systems * (rounds + 1) * _START_S + _RESUME_SAVE_PREPARE_S


def quality_s(options: argparse.Namespace) -> float:
    """Seconds of the quality part."""
    return float(_JUDGING_S + options.rows * _ROW_S + options.held * _HELD_S)


def message(seconds: float, peers: Sequence[str], cache: Path) -> str:
    """The first line that the benchmark prints."""
    to_install = missing(peers, cache)
    minutes = max(2, math.ceil((seconds + len(to_install) * _INSTALLING_S) / 60))
    text = f"about {minutes} minutes on two idle cores"
    return f"{text}, including new environments for {', '.join(to_install)}" if to_install else text
