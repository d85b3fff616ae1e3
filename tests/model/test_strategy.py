"""Weights stay whole where they fit; where they do not, they are shared by as few processes as can be."""

from pathlib import Path

import pytest
import torch
from tests.support.models import CPU, our_model, save_tiny

from llamahome.distributed.world import World
from llamahome.model.strategy import choose_strategy, count_weights, weight_bytes

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
