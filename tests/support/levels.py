"""Compiled kernels at every level that this machine supports, and the dtypes that each level has."""

import pytest
import torch

from llamahome.model.backends.cpu.native import LEVELS, Kernels, has_compiler, load_kernels, unsupported_reason

SUPPORTED_LEVELS = [level for level in LEVELS if has_compiler() and unsupported_reason(level) is None]
CASES = [
    *(pytest.param((level, torch.float32), id=f"{level}-float32") for level in SUPPORTED_LEVELS),
    pytest.param(("native", torch.bfloat16), id="native-bfloat16"),
]
"""Parameters of a fixture: a level and a dtype. Only the native level multiplies pairs of bfloat16."""


def kernels_or_skip() -> Kernels:
    """The kernels of the requested level; skips the test if there are none."""
    kernels = load_kernels()
    if isinstance(kernels, str):
        pytest.skip(kernels)
    return kernels


def kernels_at(level: str, function: str, dtype: torch.dtype) -> Kernels:
    """The kernels of a level; skips the test if it has no `function` for this dtype."""
    kernels = load_kernels(level)
    if isinstance(kernels, str) or not kernels.has(function, dtype):
        pytest.skip(f"{level} has no {function} for {dtype}")
    return kernels
