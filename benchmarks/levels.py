"""Instruction sets that a benchmark can be held to, so that a larger processor stands for a common one.

Torch, oneDNN and MKL are told by their own variables, llamahome by its own; numpy's OpenBLAS, whose product is the machine's own rate in
float32, too. Whatever a level leaves out is left out for all systems alike.
"""

import os
import subprocess
import sys
from collections.abc import Mapping

LEVELS: Mapping[str, Mapping[str, str]] = {
    "native": {},
    "avx512": {
        "LLAMAHOME_CPU_LEVEL": "avx512",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "OPENBLAS_CORETYPE": "SkylakeX",
    },
    "avx2": {
        "LLAMAHOME_CPU_LEVEL": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
}
_RATE = """
import time, numpy
side, best = 2048, 1e9
a = numpy.ones((side, side), numpy.float32)
for _ in range(6):
    begin = time.perf_counter()
    a @ a
    best = min(best, time.perf_counter() - begin)
print(2 * side**3 / best)
"""
_FAST = """
import torch
from llamahome.model.backends.choose import low_precision
print(low_precision(torch.device("cpu")).fast)
"""


def hold_to(level: str) -> None:
    """Let every process that is started from now on know no more than this level."""
    os.environ.update(LEVELS[level])


def product_rate() -> float:
    """float32 operations a second of OpenBLAS on 2,048 cubed, best of six, in a process of its own."""
    return float(_told(_RATE))


def has_fast_bf16() -> bool:
    """Whether llamahome would multiply in bfloat16 here."""
    return _told(_FAST) == "True"


def _told(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()
