"""Weights stay whole where they fit; where they do not, they are shared by as few processes as can be."""

from pathlib import Path

import pytest
import torch
from tests.support.models import CPU, our_model, save_tiny

from llamahome.distributed.world import World
from llamahome.model.strategy import choose_strategy, count_weights, sums_each_pass, weight_bytes

GIB = 2**30


def world_of(size: int, local: int) -> World:
    return World(0, size, 0, CPU, local)


@pytest.mark.parametrize(
    ("wanted", "size", "local", "needed", "expected"),
    [
        ("auto", 1, 1, 500, "replicate"),
        ("shard", 1, 1, 1, "replicate"),
        ("auto", 8, 8, 40, "replicate"),
        ("auto", 8, 8, 60, "shard"),
        ("auto", 16, 8, 390, "hybrid"),
        ("auto", 16, 8, 500, "shard"),
        ("replicate", 8, 8, 500, "replicate"),
        ("hybrid", 8, 8, 1, "shard"),
        ("hybrid", 16, 8, 1, "hybrid"),
        ("shard", 16, 8, 1, "shard"),
    ],
)
def test_the_strategy_follows_memory_and_machines(wanted: str, size: int, local: int, needed: int, expected: str) -> None:
    chosen = choose_strategy(wanted, method="lora", needed=needed * GIB, free=70 * GIB, world=world_of(size, local))
    assert chosen.strategy == expected and chosen.reason
    if wanted == "auto" and size > 1:
        assert "lora" in chosen.reason and "GiB" in chosen.reason


def test_weights_are_counted_without_reading_them(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    weights = sum(each.numel() for each in our_model(folder).parameters())
    assert count_weights(folder) == weights
    assert weight_bytes(weights, method="lora", storage=torch.bfloat16) == 2 * weights
    assert weight_bytes(weights, method="full", storage=torch.float32) == 16 * weights


@pytest.mark.parametrize(
    ("method", "strategy", "size", "needed", "each_pass"),
    [
        ("full", "shard", 8, 120, False),
        ("full", "shard", 8, 140, True),
        ("full", "hybrid", 16, 140, True),
        ("lora", "shard", 8, 140, False),
    ],
)
def test_whole_gradients_are_kept_between_passes_only_where_they_fit(
    method: str, strategy: str, size: int, needed: int, each_pass: bool
) -> None:
    """Of 70 GiB 49 may be taken: an eighth of what is needed for the rows of a process, a quarter for whole gradients."""
    world = world_of(size, 8)
    assert choose_strategy(strategy, method=method, needed=needed * GIB, free=70 * GIB, world=world).sums_each_pass == each_pass
    if method == "full":
        assert sums_each_pass(strategy, needed=needed * GIB, free=70 * GIB, world=world) == each_pass
