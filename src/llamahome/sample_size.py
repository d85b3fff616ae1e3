"""How many rows of the sample data this machine trains on in about two and a half minutes, for `data sample --rows auto`.

The estimate is for a run of the starter model with the settings of this folder. Its speed follows from the rate of one large matrix product
in the number type that the run will use, so nothing is trained. Cost: importing torch, and less than a second.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llamahome.config.load import LoadedConfig
from llamahome.config.schema import TrainingConfig
from llamahome.distributed.world import open_world
from llamahome.model.backends.choose import choose_backend
from llamahome.monitoring.throughput import measured_peak_flops, model_flops_per_token
from llamahome.training.auto import auto_batch_size, auto_epochs
from llamahome.units import show_seconds

_SECONDS = 150.0
_PROBE_SECONDS = 0.5
_MOST, _FEWEST = 400, 96
"""A fast machine takes a minute for 400 rows; with fewer than 96, twelve steps of eight, the model learns hardly anything."""
_STEP = 8
"""The number of rows is a multiple of this, the automatic batch size of so many rows."""
_ROW_TOKENS, _TARGET_SHARE = 220.0, 0.26
"""measured: the first 96, 115, 200, 320 and 400 rows have 220, 213, 229, 219 and 220 tokens each with the starter's tokenizer."""
_OWN_SHARE = 0.91
"""Of the targets, as data/content.py counts it. measured: 0.91 of 96 and of 100 rows."""
_BODY, _ADAPTERS, _HEAD = 106_168_320, 4_884_480, 28_311_552
"""Weights of the starter in matrix products: in its layers, in LoRA's matrices of rank 16 beside them, in the head."""
_REACHED = 0.6
"""Share of the rate of one large product that a step reaches. measured: LoRA on two cores without bf16 trained 160 to 185 tokens/s in
float32 at 130 GFLOP/s, a share of 0.6 to 0.7; with bf16 and compiled passes it is more."""


@dataclass(frozen=True)
class SampleSize:
    """The number of rows, and the estimate behind it."""

    rows: int
    seconds: float
    """Time of training on them, without evaluations."""
    tokens_per_s: float


def size_sample(loaded: LoadedConfig, *, say: Callable[[str], None]) -> SampleSize:
    """Measure this machine and size the sample; `say` gets the result in one line."""
    config = loaded.config
    with open_world(config.distributed, say=lambda _: None, processor=config.model.backend == "cpu") as world:
        compute = choose_backend(config, world.device).precision.compute
        rate = _best_rate(world.device, compute)
    sized = rows_within(_SECONDS, rate=rate, full=config.training.method == "full", epochs=lambda rows: _passes(config.training, rows))
    name = str(compute).removeprefix("torch.")
    speed = f"about {sized.tokens_per_s:,.0f} tokens/s here ({name} products at {rate / 1e9:,.0f} GFLOP/s)"
    takes = f"training on {sized.rows} rows takes about {show_seconds(sized.seconds)}"
    say(f"{speed}: {takes}" + ("" if sized.rows == _MOST else f"; --rows {_MOST} writes more"))
    return sized


def rows_within(seconds: float, *, rate: float, full: bool, epochs: Callable[[int], float]) -> SampleSize:
    """The most rows, from 96 to 400, on which training takes at most `seconds` at `rate` operations per second; 96 may take longer.

    `epochs` gives the number of passes for a number of rows.
    """
    per_token = model_flops_per_token(
        matmul_weights=_BODY if full else _BODY + _ADAPTERS,
        trained_matmul_weights=_BODY if full else _ADAPTERS,
        head_weights=_HEAD,
        head_is_trained=full,
        target_share=_TARGET_SHARE,
    )
    tokens_per_s = _REACHED * rate / per_token
    sizes = [SampleSize(rows, rows * epochs(rows) * _ROW_TOKENS / tokens_per_s, tokens_per_s) for rows in range(_FEWEST, _MOST + 1, _STEP)]
    return max((each for each in sizes if each.seconds <= seconds), key=lambda each: each.rows, default=sizes[0])


def _passes(training: TrainingConfig, rows: int) -> float:
    """Passes of a run over `rows` rows of the sample."""
    if training.epochs != "auto":
        return training.epochs
    batch = auto_batch_size(rows) if training.batch_size == "auto" else training.batch_size
    return auto_epochs(rows, _ROW_TOKENS * _TARGET_SHARE, _OWN_SHARE, batch_size=batch)


def _best_rate(device: torch.device, compute: torch.dtype) -> float:
    """Operations per second, the best within half a second, because other programs make a single product several times slower."""
    end, best = time.monotonic() + _PROBE_SECONDS, 0.0
    while not best or time.monotonic() < end:
        best = max(best, measured_peak_flops(device, compute))
    return best
