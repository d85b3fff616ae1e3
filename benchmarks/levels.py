"""Limits a benchmark to an instruction set, so that a large CPU can stand in for a common one.

Environment variables limit torch, oneDNN, MKL, llamahome, and numpy's OpenBLAS, whose product rate is the peak of the machine in float32.
A level limits all systems alike.
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
_RATE_CODE = """
import time, numpy
side, best = 2048, 1e9
a = numpy.ones((side, side), numpy.float32)
for _ in range(6):
    begin = time.perf_counter()
    a @ a
    best = min(best, time.perf_counter() - begin)
print(2 * side**3 / best)
"""
_FAST_BF16_CODE = """
import torch
from llamahome.model.backends.choose import low_precision
print(low_precision(torch.device("cpu")).fast)
"""


def limit_to(level: str) -> None:
    """Limit the processes that are started from now on to this level."""
    os.environ.update(LEVELS[level])


def product_rate() -> float:
    """float32 operations per second of OpenBLAS on 2,048 x 2,048 x 2,048, best of six, in a separate process."""
    return float(_output_of(_RATE_CODE))


def has_fast_bf16() -> bool:
    """Whether llamahome would multiply in bfloat16 on this machine."""
    return _output_of(_FAST_BF16_CODE) == "True"


def _output_of(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
