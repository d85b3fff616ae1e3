"""Loading, quantising, saving and resuming never make a second copy of the weights in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_ROOM = 0.25
"""Further memory that a step may use, as a share of the float32 weights (about 200 MB); a copy would be 1, or 0.5 in bfloat16."""
ALLOWED = {
    "load bfloat16 as it is": 0.0,
    "load float32 as it is": 0.0,
    "quantise to nf4": 0.0,
    "load nf4": 0.0,
    "a pass beside nf4": 0.0,
    "load bfloat16 as float32": 1.0,
    "save the model": 0.0,
    "resume the model": 0.0,
    "save the optimizer": 0.0,
    "resume the optimizer": 2.0,
}
"""Weights in the dtype of the file, and codes of 4 bits, are memory-mapped and count 0; AdamW keeps two values per weight."""


@pytest.mark.medium
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_weights_are_never_in_memory_twice(tmp_path: Path) -> None:
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}  # what is freed goes back at once, or gaps in the heap would count
    command = [sys.executable, "-m", "tests.support.memory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shares = json.loads(done.stdout.splitlines()[-1])
    assert shares.keys() == ALLOWED.keys()
    assert {name: share for name, share in shares.items() if share > ALLOWED[name] + _ROOM} == {}
