"""Compiled passes for every level that this machine has, and the types that each of them takes."""

import pytest
import torch

from llamahome.model.backends.cpu.native import LEVELS, Kernels, has_compiler, lacking, load_kernels

HERE = [level for level in LEVELS if has_compiler() and lacking(level) is None]
CASES = [
    *(pytest.param((level, torch.float32), id=f"{level}-float32") for level in HERE),
    pytest.param(("native", torch.bfloat16), id="native-bfloat16"),
]
"""Parameters of a fixture: a level and a type. Pairs of bfloat16 are multiplied at no level but the machine's own."""


def kernels_at(level: str, function: str, dtype: torch.dtype) -> Kernels:
    """The passes for a level; skips the test where `function` is not made for this type at it."""
    found = load_kernels(level)
    if isinstance(found, str) or not found.has(function, dtype):
        pytest.skip(f"{level} has no {function} for {dtype}")
    return found
